"""The application: configurations, runs, and the command line `dpo-keras`.

`runs.train`, `runs.evaluate`, `runs.generate` and `runs.export_run` are what the commands do;
`config.load_config` reads what they need.
"""
