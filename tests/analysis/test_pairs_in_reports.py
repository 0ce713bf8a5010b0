"""Reports of two-modality models: tokens are separated by modality, and only patches are drawn."""
import numpy as np

from moejax.analysis import specialisation, specialisation_report
from moejax.analysis.routes import BatchRoutes, LayerRoutes

IMAGES, PATCHES, WORDS = 2, 4, 5  # nine tokens, not a square of patches


def routes():
  """Patch 0 of each image goes to expert 2, the others to expert 0, and words to expert 1; the last word is padding."""
  expert = np.array([2, 0, 0, 0, 1, 1, 1, 1, 1])
  weight = np.broadcast_to(np.eye(3, dtype=np.float32)[expert], (IMAGES, PATCHES + WORDS, 3)).copy()
  segments = np.array([[1] * WORDS, [1] * (WORDS - 1) + [0]])
  weight[1, -1] = 0
  layer = LayerRoutes(weight=weight, read=None, load=np.full(3, 1 / 3), metrics={}, experts_per_token=1.)
  batch = dict(image=np.zeros((IMAGES, 4, 4, 1), np.float32), tokens=np.ones((IMAGES, WORDS), np.int32),
               segments=segments, label=np.arange(IMAGES), valid=np.ones(IMAGES, bool))
  return BatchRoutes({'block_01': layer}, batch)


def test_patches_and_words_are_separated_and_padding_is_neither():
  labels = specialisation_report.modality_labels(routes())
  # Rows are modalities, columns experts: 2 x 3 patches and 5 + 4 words, and one patch per image to expert 2.
  np.testing.assert_array_equal(specialisation.table(labels.members, labels.shares['block_01']), [[6, 0, 2], [0, 9, 0]])


def test_the_picture_shows_only_the_patches(monkeypatch, tmp_path):
  drawn = {}
  monkeypatch.setattr(specialisation_report.plots, 'patches', lambda images, maps, *rest: drawn.update(maps))
  monkeypatch.setattr(specialisation_report.page, 'picture', lambda folder, name, draw, **kwargs: draw() or name)
  specialisation_report.image_patches(tmp_path, routes())
  np.testing.assert_array_equal(drawn['block_01'], [[[2, 0], [0, 0]]] * IMAGES)


def test_the_section_shows_modalities_and_classes(tmp_path):
  text = specialisation_report.section(tmp_path, routes(), None)
  assert (tmp_path / 'modality_by_expert.png').exists() and (tmp_path / 'class_by_expert.png').exists()
  assert 'modality' in text


def test_a_model_of_another_kind_has_no_such_view(tmp_path):
  found = routes()
  speech = BatchRoutes(found.layers, dict(frames=np.zeros((IMAGES, 9, 3)), segments=np.ones((IMAGES, 9))))
  assert 'not shown for this kind of model' in specialisation_report.section(tmp_path, speech, None)
