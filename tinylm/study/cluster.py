"""Workers on other machines: a Dask cluster as the executor of a study's sweeps (Rocklin 2015).

``sweep`` takes any executor, and so ``Client(address).get_executor(pure=False)``; here is what ``cluster=`` of a study means.
Workers need this package, the processor and the torch of the machine that starts the sweep, the text at the same path, and
best a results folder that all of them see: without one a run still trains and is recorded, but one that was cut off starts
anew, and no models come back.
"""

from __future__ import annotations

import contextlib
import typing
from concurrent.futures import Executor, Future

from tinylm.errors import LabError
from tinylm.study.sweep import worker_pool

if typing.TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 30


class ClusterPool(Executor):
    """The workers of a Dask client. A worker process trains one stack at a time, however many threads it has. expected: how
    many there will be, where the cluster is still growing."""

    def __init__(self, client: Client, expected: int | None = None):
        self._client, self._executor, self._expected = client, client.get_executor(pure=False), expected or 1

    @property
    def workers(self) -> int:
        """Worker processes there are now, or those expected where they are more: work is packed for so many, at once."""
        return max(self._expected, len(self._client.nthreads()))

    def submit(self, fn: typing.Callable, /, *args: object, **kwargs: object) -> Future:
        return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait=wait and not cancel_futures)


@contextlib.contextmanager
def study_pool(cluster: str, workers: int | None = None) -> typing.Iterator[Executor]:
    """The executor of a study: its own worker processes where ``cluster`` is empty, those of a Dask cluster started on this
    machine where it is ``local``, else those of the cluster whose scheduler has that address. workers: how many to start,
    where they are started here (None is one a processor), else how many to pack work for where fewer have come yet. Raises
    LabError where Dask is not installed, or cannot be reached.
    """
    if not cluster:
        with worker_pool(workers) as pool:
            yield pool
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise LabError(
            "A cluster needs Dask", f"cluster={cluster!r}, {error}", "pip install -e '.[dask]', or leave cluster out"
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            if cluster == "local":
                options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
                address = stack.enter_context(LocalCluster(processes=True, **options))
            else:
                address = cluster
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS))
        except (OSError, ValueError, TypeError) as error:  # among them that it took too long
            raise LabError(
                "The scheduler of the cluster must be reachable",
                f"cluster={cluster!r}: {type(error).__name__}: {error}",
                "give the address that its scheduler prints, such as tcp://host:8786, or cluster=local",
            ) from error
        pool = ClusterPool(client, workers)
        if workers is None and not client.nthreads():
            print(
                "the cluster has no workers yet: work is packed for one; -p workers N packs it for N to come",
                flush=True,
            )
        yield pool
