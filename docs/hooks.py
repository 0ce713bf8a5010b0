"""What mkdocs does not do by itself: API pages for each package, and links that leave docs/."""
import ast
import pathlib
import re

import moejax
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r'(!\[[^\[\]]*)?\]\(\.\./([^)#\s]+)((?:#[^)\s]*)?)\)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds a page for each package of moejax, with a section for each of its modules."""
  packages = [path.parent for path in sorted((ROOT / 'moejax').rglob('__init__.py'))]
  names = {package: '.'.join(package.relative_to(ROOT / 'moejax').parts) or 'moejax' for package in packages}
  lines = [f'- [`{dotted(package)}`]({name}.md): {first_line(package / "__init__.py")}' for package, name in names.items()]
  index = ['# API', '', 'What `moejax` itself exports:', '', exports(), '', 'Packages:', '', *lines, '']
  pages = {'index': '\n'.join(index)}
  for package, name in names.items():
    modules = [package, *(path for path in sorted(package.glob('*.py')) if not path.stem.startswith('_'))]
    pages[name] = f'# {name}\n\n' + '\n'.join(f'::: {dotted(module)}\n' for module in modules if docstring(module))
  for name, text in pages.items():
    files.append(File.generated(config, f'api/{name}.md', content=text))
  for picture in sorted((ROOT / 'experiments').rglob('*.png')):
    files.append(File.generated(config, f'pictures/{picture.parent.name}_{picture.name}', abs_src_path=str(picture)))
  return files


def on_page_markdown(markdown: str, **_) -> str:
  """Links out of docs/, which work on GitHub: pictures are copied, other files become links to the repository."""
  def rewritten(match):
    picture, path, anchor = match.groups()
    if picture:
      path = pathlib.PurePosixPath(path)
      return f'{picture}](pictures/{path.parent.name}_{path.name})'
    return f'](https://github.com/moejax/moejax/blob/main/{path}{anchor})'
  return LINK.sub(rewritten, markdown)


def exports() -> str:
  """Links to all that `moejax` exports."""
  return ', '.join(f'[`{name}`][{module}.{name}]' for name, module in sorted(moejax.SOURCES.items()))


def dotted(module: pathlib.Path) -> str:
  """'moejax.routing.stages' of its path."""
  return '.'.join(module.relative_to(ROOT).with_suffix('').parts)


def docstring(module: pathlib.Path) -> str:
  """The docstring of a module or a package; empty where it has none."""
  path = module / '__init__.py' if module.is_dir() else module
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def first_line(path: pathlib.Path) -> str:
  return docstring(path).split('\n')[0]
