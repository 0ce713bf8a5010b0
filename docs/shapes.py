"""Shapes of arrays, such as <float32>[G,S,D], are text in docstrings, and would be HTML in Markdown."""
import re

import griffe


class Shapes(griffe.Extension):
  """Escapes them."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    """Called for each module, class, function and attribute."""
    if obj.docstring:
      obj.docstring.value = re.sub(r'<(?=[a-z]+\d*>|\.\.)', '&lt;', obj.docstring.value)
