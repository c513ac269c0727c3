"""Distil language models with the teacher in the loop of the student's own generation."""

import lazy_loader

__version__ = "0.1.0"

# A public name is imported when it is first used, so that importing the package stays quick. __init__.pyi lists them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
