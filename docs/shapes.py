"""Shapes of arrays, such as <float32>[G,S,D], are text in docstrings, and would be HTML in Markdown."""
import re

import griffe


CODE = r'`[^`]*`|^    .*$'  # of a module, whose other docstrings are not indented


class Shapes(griffe.Extension):
  """Escapes them outside of code."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    """Called for each module, class, function and attribute."""
    if obj.docstring:
      code = CODE if obj.is_module else CODE.partition('|')[0]
      obj.docstring.value = re.sub(rf'({code})|<(?=[a-z]+\d*>|\.\.)', lambda found: found[1] or '&lt;',
                                   obj.docstring.value, flags=re.M)
