"""Tasks for lm-evaluation-harness, one YAML file a benchmark; first sst2.yaml.

What YAML cannot say is in `functions.py`; docs/evaluation.md says how to add
one.
"""
