"""Makes the notebooks anew: the first cell is first_cell.py, the badge opens them in Colab, and all cells are executed.

    python colabs/refresh.py                       all of them
    python colabs/refresh.py 1_route_a_batch       one

Takes some minutes. The address of the repository stands in first_cell.py alone.
"""
import base64
import io
import os
import pathlib
import re
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image

HERE = pathlib.Path(__file__).parent
FIRST_CELL = (HERE / 'first_cell.py').read_text(encoding='utf-8').strip()
REPOSITORY = re.search(r"REPOSITORY = 'https://github\.com/(.*)'", FIRST_CELL)[1]
# Wide enough to read on a page; the largest notebook stays well below half a megabyte.
WIDTH = 800


def badge(name: str) -> str:
  """A picture that opens the notebook in Colab."""
  return ('[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
          f'(https://colab.research.google.com/github/{REPOSITORY}/blob/main/colabs/{name}.ipynb)')


def refresh(path: pathlib.Path) -> None:
  """Writes `path` with its first cell, badge and outputs."""
  notebook = nbformat.read(path, as_version=4)
  title, first = notebook.cells[:2]
  title.source = badge(path.stem) + '\n\n' + re.sub(r'^\[!\[Open in Colab.*\n+', '', title.source)
  first.source, first.metadata = FIRST_CELL, nbformat.NotebookNode(cellView='form')
  with tempfile.TemporaryDirectory() as folder:
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name='python3', record_timing=False, coalesce_streams=True,
                            resources={'metadata': {'path': folder}}).execute()
  for cell in notebook.cells:
    if 'outputs' in cell:  # what a library complains about is this machine's
      cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
    for output in cell.get('outputs', []):
      if 'image/png' in output.get('data', {}):
        output.data['image/png'] = smaller(output.data['image/png'])
  notebook.metadata.language_info = nbformat.NotebookNode(name='python')
  nbformat.write(notebook, path)


def smaller(picture: str) -> str:
  """A base64 PNG, at most `WIDTH` wide and of 256 colours."""
  image = Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB')
  image.thumbnail((WIDTH, 10 * WIDTH))
  image.quantize(256, dither=Image.Dither.NONE).save(written := io.BytesIO(), 'png', optimize=True)
  return base64.b64encode(written.getvalue()).decode()


if __name__ == '__main__':
  os.environ['PYTHONPATH'] = str(HERE.parent)
  for notebook_path in sorted(HERE.glob('*.ipynb')):
    if notebook_path.stem in (sys.argv[1:] or [notebook_path.stem]):
      refresh(notebook_path)
      print(f'{notebook_path.name}: {notebook_path.stat().st_size / 1e3:.0f} kB')
