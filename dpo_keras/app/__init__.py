"""The application: configuration, runs, and the command line `dpo-keras`.

config     `load_config`: YAML with overrides -> `Config`, every problem reported at once
models     policies and references from presets, directories or from scratch
runs       `train`, `evaluate`, `generate`, `export_run`: what the commands do, from Python
cli        parses and prints, nothing else
"""
