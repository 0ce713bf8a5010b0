"""Rules between models, on trees made by hand."""
import numpy as np
import pytest

from moejax.checkpoints import mapping
from moejax.checkpoints.mapping import Assigned, MappingRule
from moejax.config import ConfigError

DENSE = {'head': (3, 2), 'blocks/0/feed_forward/wi': (3, 4), 'blocks/1/feed_forward/wi': (3, 4)}
SPARSE = {'head': (3, 2), 'blocks/0/feed_forward/wi': (3, 4), 'blocks/1/moe/experts/wi': (5, 3, 4),
          'blocks/1/moe/router/score/kernel': (3, 5)}
REPEAT = MappingRule('/moe/experts/', 'repeat', '/feed_forward/')
ROUTER = MappingRule('/moe/router/', 'reinitialise')


def assign(ours, *sources, rules=(), unused=()):
  return mapping.assign(rules, unused, ours, sources, 'runs/dense, step 8')


def test_without_rules_every_array_is_copied_from_its_own_path():
  assert assign(DENSE, DENSE) == {path: Assigned('copy', path) for path in DENSE}


def test_rules_rename_and_say_what_is_done():
  assert assign(SPARSE, DENSE, rules=[REPEAT, ROUTER]) == {
      'head': Assigned('copy', 'head'), 'blocks/0/feed_forward/wi': Assigned('copy', 'blocks/0/feed_forward/wi'),
      'blocks/1/moe/experts/wi': Assigned('repeat', 'blocks/1/feed_forward/wi', 0),
      'blocks/1/moe/router/score/kernel': Assigned('reinitialise', 'blocks/1/moe/router/score/kernel', 1)}


def test_a_source_path_may_refer_to_groups():
  rule = MappingRule(r'^encoder/blocks/(\d+)/(\w+)/', source=r'blocks/\1/\2/')
  assert assign({'encoder/blocks/7/norm/scale': (3,)}, {'blocks/7/norm/scale': (3,)}, rules=[rule]) == {
      'encoder/blocks/7/norm/scale': Assigned('copy', 'blocks/7/norm/scale', 0)}


def test_the_first_rule_that_matches_counts():
  rules = [MappingRule('^head$', 'reinitialise'), MappingRule('e', 'copy')]
  assert [one.rule for one in assign(DENSE, DENSE, rules=rules).values()] == [0, 1, 1]


def test_what_is_reinitialised_needs_no_source_and_leaves_none_unused():
  rule = MappingRule('^head$', 'reinitialise')
  assert assign(DENSE, {**DENSE, 'head': (9, 9)}, rules=[rule])['head'].do == 'reinitialise'
  without = {path: shape for path, shape in DENSE.items() if path != 'head'}
  assert assign(DENSE, without, rules=[rule])['head'].do == 'reinitialise'


def test_arrays_of_the_source_may_stay_unused_if_a_pattern_says_so():
  assert assign({'head': (3, 2)}, DENSE, unused=['^blocks/']) == {'head': Assigned('copy', 'head')}


def test_values():
  one, other = {'w': np.array([1., 2.])}, {'w': np.array([3., 5.])}
  value = lambda do, shape, *sources: Assigned(do, 'w').value(sources, shape).tolist()
  assert value('copy', (2,), one) == [1, 2]
  assert value('repeat', (3, 2), one) == [[1, 2]] * 3
  assert value('stack', (2, 2), one, other) == [[1, 2], [3, 5]]
  assert value('mean', (2,), one, other) == [2, 3.5]
  assert value('resize', (3,), one) == [1, 1.5, 2]


def test_counts_are_said_in_words():
  assert mapping.counts(assign(SPARSE, DENSE, rules=[REPEAT, ROUTER]).values()) == (
      '2 copied, 1 repeated to experts, 1 reinitialised')


REFUSED = {
    'all that is missing and unused, with the rules of upcycling': (
        (SPARSE, DENSE), {},
        ': runs/dense, step 8 does not fit this model. Without a source: blocks/1/moe/experts/wi (5, 3, 4), '
        'blocks/1/moe/router/score/kernel (3, 5). Not used in the source: blocks/1/feed_forward/wi (3, 4). What would '
        "help: rules=(dict(ours='/moe/experts/', source='/feed_forward/', do='repeat'), dict(ours='/moe/router/score/', "
        "do='reinitialise'),)."),
    'another shape': (
        ({'head/kernel': (3, 2)}, {'head/kernel': (3, 9)}), {},
        ': runs/dense, step 8 does not fit this model. Of another shape: head/kernel (3, 2) from (3, 9). What would '
        "help: rules=(dict(ours='^head/', do='reinitialise'),)."),
    'positions of another length': (
        ({'encoding/table': (9, 2)}, {'encoding/table': (5, 2)}), {},
        "from (5, 2). What would help: rules=(dict(ours='^encoding/', do='resize'),)."),
    'positions of another grid': (
        ({'encoding/table': (9, 2)}, {'encoding/table': (16, 2)}), {},
        "What would help: rules=(dict(ours='^encoding/', do='resize_grid'),)."),
    'a rule whose source is missing': (
        ({'a': (2,)}, {'b': (2,)}), dict(rules=[MappingRule('a', source='c')]),
        'Without a source: a (2,) (rules[0], c). Not used in the source: b (2,). What would help: '
        "rules=(dict(ours='^a$', do='reinitialise'),), and unused=('^b$',)."),
    'a rule that does not fit': (
        ({'a': (2, 3)}, {'a': (4,)}), dict(rules=[MappingRule('a', 'repeat')]),
        'Of another shape: a (2, 3) from (4,) (rules[0]).'),
    'many': (
        ({f'blocks/{n}/norm/scale': (2,) for n in range(9)}, {}), {}, 'blocks/5/norm/scale (2,) and 3 more. What would '
        "help: rules=(dict(ours='/norm/', do='reinitialise'),)."),
    'a rule that matches nothing': (
        (DENSE, DENSE), dict(rules=[MappingRule('^head$'), MappingRule('/feed_foward/')]),
        ".rules[1]: ours='/feed_foward/' matches no array of this model that an earlier rule does not match. There are, "
        'for example, blocks/'),
    'a rule behind another': (
        (DENSE, DENSE), dict(rules=[MappingRule(''), MappingRule('head')]), ".rules[1]: ours='head' matches no array"),
    'a pattern that matches nothing': (
        (DENSE, DENSE), dict(unused=['^haed']), ".unused[0] = '^haed' matches no array of runs/dense, step 8. There are"),
    'one of several sources': (
        (DENSE, DENSE, DENSE), {}, ".path names 2 sources, and head would start by 'copy': a rule for it must have "
        "do='mean' or do='stack'. A last rule with ours='' matches all others."),
    'several of one source': (
        (DENSE, DENSE), dict(rules=[MappingRule('', 'mean')]),
        ".path names 1 source, and head would start by 'mean': a rule for it must have another `do`"),
    'experts of other numbers than sources': (
        (dict(a=(3, 4)), dict(a=(4,)), dict(a=(4,))), dict(rules=[MappingRule('', 'stack')]),
        'Of another shape: a (3, 4) from (4,) (rules[0]).'),
    'an array that one of the sources lacks': (
        (dict(a=(4,)), dict(a=(4,)), dict(b=(4,))), dict(rules=[MappingRule('', 'mean')]), 'Without a source: a (4,)'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_no_rule_allows_is_refused_with_what_would_help(what):
  trees, options, sentence = REFUSED[what]
  with pytest.raises(ConfigError) as error:
    assign(*trees, **options)
  assert sentence in str(error.value)


@pytest.mark.parametrize('ours, source, why', [('(', None, 'unterminated'), ('(', 'x', 'unterminated'), ('a', r'\1', 'invalid group')])
def test_patterns_that_cannot_be_used_are_refused(ours, source, why):
  with pytest.raises(ConfigError, match=f'is not a regular expression, or .*{why}'):
    MappingRule(ours, source=source)
