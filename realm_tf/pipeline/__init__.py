"""The pipeline: all stages in order, from a corpus to a trained, evaluated and served system.

`python -m realm_tf.pipeline` runs it. `plan` unpacks the config, `stages` lists the stages,
`runner` runs them, `summary` and `plots` show the results.
"""
