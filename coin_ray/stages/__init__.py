"""The stages: one module each with ``run(context) -> metrics``. Only here (and in
serving) is Ray imported.
"""
