"""Studies: runs and their records, sweeps, fits of scaling laws, forecasts, plans, plots and reports.

The core of the package (model, text, trainer, sampler) knows nothing of what is in here.
"""
