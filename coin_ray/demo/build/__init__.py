"""Rebuild the files in ``demo/assets``; see ``docs/demo.md``. Not needed to run the demo."""
