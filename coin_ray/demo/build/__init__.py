"""Scripts that rebuild everything in ``demo/assets``; see ``docs/demo.md``. Not needed
to run the demo.
"""
