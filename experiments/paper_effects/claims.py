"""All claims, `{name: Effect}`, by alphabet: what a paper reports, and the runs that show it or not.

To add one: an entry here whose system is that of a config's `System:` line, then `python -m experiments.paper_effects
<name>` and `python -m moejax.systems --write`.
Claims whose names agree before the slash share their runs where their variants agree.
"""
from experiments.paper_effects.effect import Effect
from experiments.paper_effects.metrics import heaviest_load, load_variation, text_success


def _steps(steps):
  return {'training.steps': steps, 'evaluation.every': steps, 'checkpoint.every': steps}


# Classifiers of digits and decoders on dialogues, small: some seconds a run on one core.
TINY_IMAGES = {
    'model.dim': 32, 'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64, **_steps(200),
    'optimizer.schedule.warmup': 20}
TINY_TEXT = {
    'model.dim': 64, 'model.moe.experts.hidden': 128, 'model.feed_forward.hidden': 128,
    'data.length': 64, 'data.batch_size': 16, 'data.source.test_fraction': 0.002,
    'training.steps': 200, 'optimizer.schedule.warmup': 20, 'evaluation.every': 200, 'checkpoint.every': 200}
# Synthetic speakers who use the same sounds for other phones: see `moejax.data.synthetic_speech`.
SPEAKERS = dict(
    system='SpeechMoE', config='configs/speech_moe_digits.py:speakers',
    common={'data.length': 16, 'data.batch_size': 32, 'training.steps': 300, 'model.num_layers': 2, 'model.dim': 32,
            'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64, 'optimizer.schedule.warmup': 20})
DOMAINS = dict(program='domains', metric='eval/test/perplexity', larger='dense')
CLUSTERS = dict(system='Towards Understanding MoE', program='clusters', variants=('nonlinear', 'linear'))

CLAIMS = {
  # What the balanced assignment prevents.
  'base_layers': Effect(
      system='BASE layers',
      claim='Without the assignment, and without a loss, some experts get far more tokens than others.',
      program='compared', variants=('balanced assignment', 'best expert'),
      metric=heaviest_load, larger='best expert', smaller='balanced assignment', at_least=2.),
  # What a cap on experts a token costs (Expert Choice, section 4.5).
  'capped_expert_choice': Effect(
      system='Expert Choice (capped)',
      claim='At most 2 experts for each token, with room for 2 on average, classify worse than without a cap.',
      config='configs/capped_expert_choice_digits.py', common=TINY_IMAGES,
      variants={'cap 2': {'model.moe.router.select.cap': 2.}, 'cap 8': {'model.moe.router.select.cap': 8.}},
      metric='eval/test/loss', larger='cap 2', smaller='cap 8'),
  # Which experts trees with a searched order find, and which top-k does, where experts are fixed.
  'comet': Effect(
      system='COMET',
      claim='Of two experts out of 16 that make up a task, COMET with its search finds both more often than a top-2.',
      program='support', variants=('comet_plus', 'comet', 'top_k'),
      metric='recovered', larger='comet_plus', smaller='top_k'),
  # Random Token Selection spreads what is dropped over a sequence (DeepSpeed-MoE, section 3).
  'deepspeed': Effect(
      system='DeepSpeed-MoE',
      claim='At half the capacity, dropping by position drops the last quarter of a sequence more often than the '
            'first; random token selection does not.',
      program='deepspeed_drops', variants=('by position', 'random'),
      metric='last_minus_first', larger='by position', smaller='random', at_least=3.),
  # Experts that domains of text are routed to, against a dense model of the same active compute: DEMix (2108.05036,
  # table 2), task-aware gates (2204.07689), and routes learned for each task (2205.12701).
  'domains/demix': Effect(
      system='DEMix', claim='Told the domain, experts by domain have a lower perplexity than a dense model.',
      variants=('dense', 'demix'), smaller='demix', **DOMAINS),
  'domains/task_aware': Effect(
      system='Task-aware MoE', claim='Two experts by token and domain have a lower perplexity than a dense model.',
      variants=('dense', 'task_aware'), smaller='task_aware', **DOMAINS),
  'domains/cross_task': Effect(
      system='CrossTaskMoE',
      claim='Experts that each domain picks for itself have a lower perplexity than a dense model.',
      variants=('dense', 'cross_task'), smaller='cross_task', **DOMAINS),
  # Which experts a differentiable gate finds, and which top-k does, where experts are fixed.
  'dselect_k': Effect(
      system='DSelect-k',
      claim='Of two experts out of 16 that make up a task, DSelect-k finds both more often than a top-2 gate.',
      program='support', variants=('dselect_k', 'top_k'), metric='recovered', larger='dselect_k', smaller='top_k'),
  # Experts that take twice as many tokens classify better than experts that take each token half as often.
  'expert_choice': Effect(
      system='Expert Choice',
      claim='Capacity factor 2 classifies better than a quarter of it (Expert Choice, figure 4).',
      config='configs/expert_choice_digits.py', common={**_steps(200), 'optimizer.schedule.warmup': 20},
      variants={'factor 0.5': {'model.moe.router.select.capacity_factor': 0.5}, 'factor 2': {}},
      metric='eval/test/accuracy', larger='factor 2', smaller='factor 0.5'),
  # A token that lost one of two experts gives the other all the weight (fairseq's default order).
  'fairseq': Effect(
      system='fairseq MoE',
      claim='With few slots, evaluated with a quarter of what training has, the loss rises.',
      config='configs/fairseq_chitchat.py', common={**TINY_TEXT, 'model.positions.length': 64},
      variants={'as in training': {}, 'a tenth of the tokens': {'model.moe.router.place.eval_capacity_factor': 0.1}},
      metric='eval/test/loss', larger='a tenth of the tokens', smaller='as in training'),
  # What a sorted, grouped product saves (FastMoE, section 5): time against the number of experts.
  'fastmoe': Effect(
      system='FastMoE',
      claim='From 4 to 64 experts, a loop over experts takes at least four times as much longer as sorted tokens do.',
      program='expert_growth', variants=('reference', 'grouped'),
      metric='growth', larger='reference', smaller='grouped', at_least=4.),
  # What the reassignment of the SWIPE gate prevents.
  'fastmoe_swipe': Effect(
      system='FastMoE (SWIPE gate)',
      claim='Without the reassignment, and without a loss, some experts get far more tokens than others.',
      program='compared', variants=('swipe', 'two best experts'),
      metric=heaviest_load, larger='two best experts', smaller='swipe', at_least=1.5),
  # More experts at the same compute learn faster, with diminishing returns (GLaM, figure 3).
  'glam': Effect(
      system='GLaM',
      claim='Two of 16 experts reach a lower loss than two of two, at the same compute for each token.',
      config='configs/glam_chitchat.py', common={**TINY_TEXT, 'model.moe.experts.hidden': 64, **_steps(400)},
      variants={'2 experts': {'model.moe.num_experts': 2}, '16 experts': {'model.moe.num_experts': 16}},
      metric='eval/test/loss', larger='2 experts', smaller='16 experts'),
  # Sparse experts generalise to domains that training does not see (GMoE, table 1).
  'gmoe': Effect(
      system='GMoE', claim='Digits of an unseen rotation are read better than by the dense model.',
      program='rotated_digits', variants=('dense', 'cosine router'),
      metric='unseen', larger='cosine router', smaller='dense'),
  # The balance loss keeps tokens from being dropped (GShard, section 2.2).
  'gshard': Effect(
      system='GShard', claim='Without the balance loss, more choices find their expert full.',
      config='configs/gshard_chitchat.py', common={**TINY_TEXT, 'model.moe.router.place.capacity_factor': 1.},
      variants={'no loss': {'model.moe.router.balance.switch.coefficient': 0.},
                'loss 0.01': {'model.moe.router.balance.switch.coefficient': 0.01}},
      metric='router/block_01/dropped', larger='no loss', smaller='loss 0.01', at_least=1.2),
  # What is hashed decides (Hash Layers, section 5 and table 3).
  'hash_layers': Effect(
      system='Hash layers', claim='Hashing positions, which say nothing of the word, is worse than hashing words.',
      program='hash_variants', variants=('random', 'positions'),
      metric='loss', larger='positions', smaller='random'),
  'hash_layers/oracle': Effect(
      system='Hash layers', claim='An oracle that hashes the next word is far below all that a model can use.',
      program='hash_variants', variants=('random', 'future'),
      metric='loss', larger='random', smaller='future', at_least=1.3),
  # HASH of the unified scaling laws: what experts are worth where tokens are routed by their number alone.
  'hash_modulo': Effect(
      system='HASH', claim='At the same compute for each token, 16 experts reach a lower loss than one.',
      config='configs/hash_modulo_chitchat.py', common={**TINY_TEXT, **_steps(400)},
      variants={'1 experts': {'model.moe.num_experts': 1}, '16 experts': {'model.moe.num_experts': 16}},
      metric='eval/test/loss', larger='1 experts', smaller='16 experts'),
  # Losses over both levels of a hierarchy (Sparsely-gated MoE, appendix B).
  'hierarchical': Effect(
      system='Hierarchical MoE',
      claim='Without the importance and load losses, the load of the experts of all groups varies twice as much at '
            'least.',
      config='configs/hierarchical_chitchat.py',
      common={'model.dim': 64, 'model.moe.experts.hidden': 64, 'data.batch_size': 8, 'data.length': 64,
              'data.source.test_fraction': 0.002, 'training.steps': 200, 'training.log_every': 20},
      variants={'without losses': {'model.moe.router.balance.gate_importance': 0.0,
                                   'model.moe.router.balance.hierarchical_load.coefficient': 0.0},
                'both 0.1': {}},
      metric=load_variation, larger='without losses', smaller='both 0.1', at_least=2.),
  # What becomes of the text without the entropy losses: 64 patches and 6 words a pair, so that text is a minority, as
  # with the paper's 196 and 16.
  'limoe': Effect(
      system='LIMoE',
      claim='With entropy losses by modality, more of the text is computed than with the classic losses alone.',
      config='configs/limoe_digits.py',
      common={'training.steps': 200, 'training.log_every': 10, 'data.batch_size': 16, 'model.patch_size': 1,
              'model.num_layers': 2, 'model.dim': 32, 'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64,
              'model.moe.group': 1120, 'optimizer.schedule.warmup': 20},
      variants={'classic losses': {'model.moe.router.balance.local_entropy.coefficient': 0.0,
                                   'model.moe.router.balance.global_entropy.coefficient': 0.0},
                'entropy losses': {}},
      metric=text_success, larger='entropy losses', smaller='classic losses'),
  # Biases that are stepped against the load (2408.15664), instead of a loss.
  'loss_free': Effect(
      system='Loss-free balancing',
      claim='Without the steps of the biases, the load of the experts varies at least three times as much.',
      config='configs/loss_free_chitchat.py', common=TINY_TEXT,
      variants={'no steps': {'model.moe.router.balance.bias.rate': 0.}, 'steps of 0.001': {}},
      metric=load_variation, larger='no steps', smaller='steps of 0.001', at_least=3.),
  # Further experts by chance (st-moe-pytorch, after GShard): what they save.
  'lucidrains': Effect(
      system='st-moe-pytorch',
      claim='Where second and third experts are always taken, more choices find their expert full than where by '
            'chance.',
      config='configs/lucidrains_chitchat.py', common=TINY_TEXT,
      variants={'all': {'model.moe.router.select.policy': 'all'},
                'random': {'model.moe.router.select.policy': 'random'}},
      metric='router/block_01/dropped', larger='all', smaller='random'),
  # Neighbouring tokens go to the same expert (Mixtral, table 5).
  'mixtral': Effect(
      system='Mixtral',
      claim='A byte has the same first expert as the byte before it more often than any two bytes have.',
      program='repetition', variants=('neighbours', 'any two'), metric='same', larger='neighbours', smaller='any two'),
  # Balance losses at both levels of MoE2D.
  'moe_2d': Effect(
      system='MoE2D',
      claim='Without the balance losses of groups and of experts, more choices find their group or expert full.',
      config='configs/moe_2d_chitchat.py', common=TINY_TEXT,
      variants={'no loss': {'model.moe.router.balance.hierarchical_switch': 0.}, 'loss 0.01': {}},
      metric='router/block_01/dropped', larger='no loss', smaller='loss 0.01', at_least=1.2),
  # The loss that Mesh TensorFlow adds to Expert Choice.
  'mtf_expert_choice': Effect(
      system='Expert Choice (Mesh TensorFlow)',
      claim='Without the loss that evens out what tokens get, more tokens are taken by no expert.',
      config='configs/mtf_expert_choice_digits.py', common=TINY_IMAGES,
      variants={'no loss': {'model.moe.router.balance.tokens': 0.}, 'loss 0.01': {}},
      metric='router/block_01/dropped', larger='no loss', smaller='loss 0.01'),
  # MultiHash (Hash Layers, table 4): parts of a feed-forward by several hashes.
  'multi_hash': Effect(
      system='MultiHash layers',
      claim='Two hashes, each of half a feed-forward, reach a lower loss than one of the whole.',
      program='compared', variants=('one hash', 'two hashes'),
      metric='eval/test/loss', larger='one hash', smaller='two hashes'),
  # The reward teaches the router which experts predict well (RL-R, 2202.01169, section 3.3).
  'rl_routing': Effect(
      system='RL-R', claim='Taught by the reward, the router becomes more certain than by the balance loss alone.',
      config='configs/rl_routing_chitchat.py:one',
      common={'training.steps': 150, 'model.dim': 48, 'model.moe.experts.hidden': 96, 'data.length': 64,
              'data.source.test_fraction': 0.004, 'evaluation.every': 150, 'checkpoint.every': 150},
      variants={'no reward': {'method.coefficient': 0.0}, 'reinforce': {'method.coefficient': 1.0}},
      metric='router/block_01/entropy', larger='no reward', smaller='reinforce'),
  # What the transport plan prevents.
  's_base': Effect(
      system='S-BASE',
      claim='With slots for twice an equal share, tokens are dropped where they choose by their logits, hardly any by '
            'the plan.',
      program='compared', variants=('transport plan', 'largest logit'),
      metric='router/block_00/dropped', larger='largest logit', smaller='transport plan'),
  # Soft MoE (2308.00951, figure 3) against tokens that choose, at the same compute.
  'soft_moe': Effect(
      system='Soft MoE', claim='Mixed slots classify better than two experts for each patch, at the same compute.',
      program='compared', variants=('soft slots', 'two experts a patch'),
      metric='eval/test/accuracy', larger='soft slots', smaller='two experts a patch'),
  # What the sums over experts of sparsity-constrained optimal transport do for tokens.
  'sparse_ot': Effect(
      system='Sparsity-constrained OT',
      claim='Of the same number of slots, fewer tokens are left without any than by Expert Choice.',
      program='compared', variants=('sparse transport', 'expert choice'),
      metric='router/block_03/dropped', larger='expert choice', smaller='sparse transport'),
  # What the losses do to the load of the experts (Sparsely-gated MoE, section 4 and table 6).
  'sparsely_gated': Effect(
      system='Sparsely-gated MoE',
      claim='Without the importance and load losses, the load of the experts varies at least five times as much.',
      config='configs/sparsely_gated_chitchat.py',
      common={'model.dim': 64, 'model.moe.num_experts': 8, 'model.moe.experts.hidden': 64, 'data.batch_size': 8,
              'data.length': 64, 'model.moe.router.select.k': 2, 'training.steps': 200, 'training.log_every': 20},
      variants={'without losses': {'model.moe.router.balance.gate_importance': 0.0,
                                   'model.moe.router.balance.smooth_load': 0.0},
                'both 0.1': {}},
      metric=load_variation, larger='without losses', smaller='both 0.1', at_least=5.),
  # Whether routers that see the shared network make fewer errors, and what the sparsity loss does to them.
  'speech_moe': Effect(
      claim='Routers that see the shared embedding network make fewer errors than routers that see the layer alone.',
      variants={'all': {}, 'layer alone': {'model.moe.router.features.shared_dim': 0}},
      metric='eval/test/label_error_rate', larger='layer alone', smaller='all', **SPEAKERS),
  'speech_moe/sparsity': Effect(
      claim='The sparsity loss makes the router more certain: the mean of its largest probability rises.',
      variants={'all': {}, 'no sparsity loss': {'model.moe.router.balance.sparsity': 0.0}},
      metric='router/block_01/confidence', larger='all', smaller='no sparsity loss', **SPEAKERS),
  # The router z-loss keeps router logits small (ST-MoE, section 3.3).
  'st_moe': Effect(
      system='ST-MoE',
      claim="Without the router z-loss, the routers' log-partition functions grow larger.",
      config='configs/st_moe_chitchat.py',
      common={'model.dim': 64, 'data.length': 64, 'data.source.test_fraction': 0.002, 'training.steps': 200,
              'optimizer.schedule.peak': 1e-2, 'evaluation.every': 200, 'checkpoint.every': 200},
      variants={f'z-loss {size}': {f'model.{side}.moe.router.balance.z': size for side in ('encoder', 'decoder')}
                for size in (0., 1e-3)},
      metric='router/encoder_block_01/z_loss', larger='z-loss 0.0', smaller='z-loss 0.001', at_least=1.5),
  # Greedy routing goes on changing, distilled routing does not (StableMoE, figure 1 and section 4.4).
  'stable_moe': Effect(
      system='StableMoE', claim='With stage 1 alone, more bytes change their expert after a third of training.',
      program='routing_stability', variants=('greedy', 'stable'),
      metric='fluctuation', larger='greedy', smaller='stable'),
  # Thresholds that are learned in training for evaluation (Sparsely-gated MoE, appendix F).
  'strictly_balanced': Effect(
      system='Sparsely-gated MoE (strictly balanced)',
      claim='At evaluation, an expert takes a number of tokens nearer to an equal share where its threshold has '
            'learned.',
      program='thresholds', variants=('loss 0', 'loss 1'), metric='imbalance', larger='loss 0', smaller='loss 1'),
  # More experts at the same compute learn faster (Switch Transformer, figure 1). What an expert more costs in slots
  # is kept out: every variant has room for all tokens.
  'switch': Effect(
      system='Switch Transformer', claim='At the same compute for each token, 16 experts reach a lower loss than one.',
      config='configs/switch_chitchat.py',
      common={**TINY_TEXT, 'model.moe.router.place.capacity_factor': 2., **_steps(400)},
      variants={'1 experts': {'model.moe.num_experts': 1}, '16 experts': {'model.moe.num_experts': 16}},
      metric='eval/test/loss', larger='1 experts', smaller='16 experts'),
  # Smaller initial weights make early training steadier (Switch Transformer, table 3).
  'switch_init': Effect(
      system='Switch Transformer',
      claim='Early in training, experts that start at a tenth of the variance have a lower loss.',
      config='configs/switch_chitchat.py',
      common={**TINY_TEXT, **_steps(50), 'model.moe.router.place.capacity_factor': 2.},
      variants={'scale 1': {'model.moe.experts.init_scale': 1.}, 'scale 0.1': {'model.moe.experts.init_scale': 0.1}},
      metric='eval/test/loss', larger='scale 1', smaller='scale 0.1'),
  # What a task uses can be taken out and served as a dense model (Task-level MoE, 2110.03742, section 4.4).
  'task_moe': Effect(
      system='Task-level MoE', claim='The dense model extracted for a task says the same as the full one, faster.',
      program='task_throughput', variants=('full', 'extracted'),
      metric='bytes_per_second', larger='extracted', smaller='full'),
  # Consistency makes the prediction independent of which experts are drawn (THOR, 2110.04260, section 3).
  'thor': Effect(
      system='THOR',
      claim='With the consistency loss, the loss varies at most a third as much over draws of the experts.',
      program='thor_draws', variants=('alpha 0', 'alpha 5'),
      metric='spread', larger='alpha 0', smaller='alpha 5', at_least=3.),
  # Mixtures of nonlinear and of linear experts on data in clusters (Towards Understanding MoE, table 1).
  'understanding_moe': Effect(
      claim='On data in clusters, cubic experts with a linear router are more accurate than linear ones, by 3% at '
            'least.',
      metric='test/accuracy', larger='nonlinear', smaller='linear', at_least=1.03, **CLUSTERS),
  'understanding_moe/entropy': Effect(
      claim='Linear experts leave at least twice the entropy about the cluster that cubic experts leave.',
      metric='test/dispatch_entropy', larger='linear', smaller='nonlinear', at_least=2., **CLUSTERS),
  # Batch Prioritized Routing at low capacity (V-MoE, figure 8).
  'vmoe': Effect(
      system='V-MoE',
      claim='Evaluated with a quarter of the capacity, a model is more accurate with batch priority than without.',
      program='vmoe_capacity', variants=('batch', 'position'), metric='accuracy', larger='batch', smaller='position'),
  # A shared mixture is better than a shared dense block, more so with norms of each layer (WideNet, table 5). Two
  # experts of 64 are one of 128.
  'widenet': Effect(
      system='WideNet',
      claim='Layers that share a mixture, all but norms, classify better than layers that share a dense block.',
      config='configs/widenet_digits.py', common=TINY_IMAGES,
      variants={'ALBERT': {'model.moe.num_experts': 1, 'model.moe.router.select.k': 1, 'model.moe.experts.hidden': 128,
                           'model.sharing': 'all'},
                'shared norms': {'model.sharing': 'all'},
                'WideNet': {}},
      metric='eval/test/accuracy', larger='WideNet', smaller='ALBERT'),
  # Cosine routing in few dimensions changes its mind less than dot products do (X-MoE, section 5.3).
  'xmoe': Effect(
      system='X-MoE', claim='With dot products, more bytes change their expert after a third of training.',
      program='routing_stability', variants=('dot', 'cosine'), metric='fluctuation', larger='dot', smaller='cosine'),
}
