"""What every agent must do: its flags reach what they are for, and it learns and acts as it says.

The agents are found by listing: a copied directory is tested as it appears. A Config is asked what
it has, and each agent learns with its own network, but for a small torso.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import pathlib
import types
import typing
from typing import Any, NamedTuple

import chex
import dm_env
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offline_zoo import (
  atari_env,
  evaluation,
  networks,
  parts,
  playing,
  program,
  replay,
  results,
  seeds,
  testing,
)
from offline_zoo.logs import bundled

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PACKAGE = pathlib.Path(__file__).parent
NUM_ACTIONS = 7  # no other axis of a network's outputs is as long
every_agent = pytest.mark.parametrize(
  'agent', [pytest.param(agent, marks=pytest.mark.xdist_group(agent)) for agent in testing.AGENTS]
)


# Directories.


@every_agent
def test_a_directory_uses_its_own_files_and_no_other_agents(agent):
  """So that a copy of it is an agent of its own, without an edit."""
  assert not agent.startswith('online_'), 'names of agents that learn online begin so'
  for path in (PACKAGE / agent).glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and not node.level:
        named = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
      elif isinstance(node, ast.Import):
        named = [alias.name for alias in node.names]
      else:
        continue
      used = {x.split('.')[1] for x in named if x.startswith('offline_zoo.')} & {*testing.AGENTS}
      assert agent not in used, f'{path}: import it relatively'
      assert not used or path.name.endswith('_test.py'), f'{path}: agents do not share code'
  module = testing.run_atari(agent)
  assert module.agent.__file__ == str(PACKAGE / agent / 'agent.py')
  assert testing.agent_class(module.agent).__module__ == f'offline_zoo.{agent}.agent'


# What must be the same text in every agent, where an agent is another: (agent, name): why.
DIFFERENCES: dict[tuple[str, str], str] = {}


@every_agent
def test_acting_and_states_are_the_same_text_in_every_agent(agent):
  for name in ('step', 'reset', 'get_state', 'set_state'):
    ours, dqns = (
      inspect.getsource(getattr(testing.agent_class(testing.run_atari(x).agent), name))
      for x in (agent, 'dqn')
    )
    if (agent, name) in DIFFERENCES:
      assert ours != dqns, f'{name} is the same again: take it off DIFFERENCES'
    else:
      assert ours == dqns, f'list in DIFFERENCES why {name} is another, or mend it'


# Flags.


EXPERIMENT = {
  'environment_name': 'pong',
  'replay_dir': None,
  'shards': None,
  'max_rows_per_shard': None,
  'first_fraction': None,
  'max_random_transitions': None,
  'min_episode_return': None,
  'top_fraction': None,
  'replay_cache_dir': None,
  'replay_memory_gb': None,
  'results_csv_path': None,
  'checkpoint_dir': None,
  'keep_checkpoints': 'last',
  'tensorboard_dir': None,
  'video_dir': None,
  'seed': 1,
  'num_seeds': 1,
  'num_iterations': 200,
  'num_updates_per_iteration': 62_500,
  'eval_steps': 125_000,
  'eval_epsilon': 0.001,
  'sticky_action_probability': 0.25,
  'rom_dir': None,
  'batch_size': 32,
  'padding': 'SAME',
  'n_step': 1,
  'discount': 0.99,
  'max_abs_reward': 1.0,
  'target_network_update_period': 2_000,
  'num_eval_workers': None,
  'jax_platform_name': None,
  'compilation_cache_dir': None,
  'debug': False,
}
# What an agent without returns does not have.
RETURNS = ('n_step', 'discount', 'max_abs_reward', 'target_network_update_period')
RMSPROP = {'learning_rate': 0.00025, 'rmsprop_decay': 0.95, 'rmsprop_epsilon': 0.00001}
SLOW_ADAM = {'learning_rate': 0.00005, 'adam_epsilon': 0.0003125}
# As published; see each Config for where.
DEFAULTS = {
  'dqn': {**EXPERIMENT, **RMSPROP, 'double_q': False},
  'qrdqn': {**EXPERIMENT, **SLOW_ADAM, 'num_quantiles': 200},
  'rem': {**EXPERIMENT, **SLOW_ADAM, 'num_heads': 200, 'num_mixtures': 1, 'ensemble': False},
  'cql': {**EXPERIMENT, **SLOW_ADAM, 'num_quantiles': 200, 'alpha': 1.0, 'double_q': False},
  'c51': {
    **EXPERIMENT,
    'double_q': False,
    'num_atoms': 51,
    'vmax': 10.0,
    'learning_rate': 0.00025,
    'adam_epsilon': 0.0003125,
  },
  'bc': {
    **{k: v for k, v in EXPERIMENT.items() if k not in RETURNS},
    'penalty': 0.0,
    'learning_rate': 0.0001,
    'adam_epsilon': 1e-8,
  },
  'off_policy_dqn': {
    **EXPERIMENT,
    **RMSPROP,
    'n_step': 5,
    'target_epsilon': 0.001,
    'min_ratio': 0.99,
    'max_ratio': 1.01,
    'first_ratio': True,
  },
  'crr': {
    **EXPERIMENT,
    'target_network_update_period': 500,
    'mode': 'exp',
    'beta': 1.0,
    'max_weight': 20.0,
    'min_q_weight': 10.0,
    'sample_actions': False,
    'learning_rate': 0.0001,
    'adam_epsilon': 1e-8,
  },
  'multi_network_rem': {
    **EXPERIMENT,
    **SLOW_ADAM,
    'num_networks': 4,
    'num_mixtures': 1,
    'ensemble': False,
  },
  'bcq': {
    **EXPERIMENT,
    'target_network_update_period': 8_000,
    'threshold': 0.3,
    'behaviour_weight': 1.0,
    'logits_penalty': 0.01,
    'learning_rate': 0.0000625,
    'adam_epsilon': 0.00015,
  },
}


@pytest.mark.parametrize('agent', DEFAULTS)
def test_defaults_are_the_published_values(agent):
  defaults = {f.name: f.default for f in dataclasses.fields(testing.run_atari(agent).Config)}
  assert defaults == DEFAULTS[agent]


@every_agent
def test_laptop_values_are_a_flag_file_with_reasons(agent):
  lines = (PACKAGE / agent / 'laptop.flags').read_text().splitlines()
  values = [line for line in lines if line.startswith('--')]
  config = program.parse_config(testing.run_atari(agent).Config, ' '.join(values))
  changed = {
    field.name
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != field.default
  }
  assert changed >= {'num_iterations', 'num_updates_per_iteration', 'eval_steps'}
  assert {value.split('=')[0] for value in values} == {f'--{name}' for name in changed}
  for before, line in itertools.pairwise(lines):
    assert not line or line[0] in '#-'
    # A reason before each value, or before the first of some that belong together.
    assert not line.startswith('--') or before, f'{line}: why?'


@every_agent
@pytest.mark.parametrize(
  'name, value',
  [
    ('seed', -1),
    ('num_seeds', 0),
    ('num_iterations', 0),
    ('num_updates_per_iteration', 0),
    ('eval_steps', 0),
    ('eval_epsilon', 2.0),
    ('num_eval_workers', -1),
    ('sticky_action_probability', -0.1),
    ('max_rows_per_shard', 0),
    ('first_fraction', 0.0),
    ('first_fraction', 1.5),
    ('max_random_transitions', 0),
    ('replay_memory_gb', 0.0),
    ('batch_size', 0),
    ('padding', 'same'),
    ('n_step', 0),
    ('discount', 1.1),
    ('max_abs_reward', 0.0),
    ('target_network_update_period', -1),
    ('learning_rate', 0.0),
    ('adam_epsilon', 0.0),
    ('rmsprop_decay', 1.1),
    ('rmsprop_epsilon', 0.0),
    ('keep_checkpoints', 'some'),
  ],
)
def test_bad_values_are_named(agent, name, value):
  config_class = testing.run_atari(agent).Config
  if hasattr(config_class, name):
    with pytest.raises(ValueError, match=f'--{name}={value}: expected'):
      config_class(**{name: value})


# Where each flag goes: (function, parameter, and if it is a part of what that is given, which). A
# flag that is not listed goes to a parameter of its own name, of one of OWN_NAMES.
OWN_NAMES = ('Logs', 'AtariEnv', 'network', 'agent', 'optimizer')
PLACES: dict[str, list[tuple]] = {
  'environment_name': [('AtariEnv', 'environment_name')],
  'replay_dir': [('Logs', 'replay_dir')],
  'shards': [('Logs', 'shards')],
  'max_rows_per_shard': [('Logs', 'max_rows_per_shard')],
  'replay_cache_dir': [('cache_dir', 'flag')],
  'replay_memory_gb': [('Logs', 'memory_gb')],
  'seed': [('Logs', 'seed'), ('PRNGKey', 'seed')],
  'num_iterations': [('resident', 'num_iterations')],
  'num_updates_per_iteration': [('learn_iteration', 'num_updates')],
  'sticky_action_probability': [('AtariEnv', 'sticky_action_probability')],
  'rom_dir': [('AtariEnv', 'rom_dir')],
  'n_step': [('Logs', 'n_step')],
  'discount': [('Logs', 'discount')],
  'max_abs_reward': [('Logs', 'max_abs_reward')],
  'num_atoms': [('network', 'atoms', len), ('agent', 'atoms', len)],
  'vmax': [('network', 'atoms', max), ('agent', 'atoms', max)],
  'learning_rate': [('optimizer', 'learning_rate')],
  'adam_epsilon': [('optimizer', 'eps')],
  'rmsprop_decay': [('optimizer', 'decay')],
  'rmsprop_epsilon': [('optimizer', 'eps')],
}
# The whole Config is given to Results and Evaluator; the rest is program.run's, or tested below.
ELSEWHERE = {
  'num_seeds',
  'eval_steps', 'num_eval_workers',
  'results_csv_path', 'checkpoint_dir', 'keep_checkpoints', 'tensorboard_dir', 'video_dir',
  'jax_platform_name', 'compilation_cache_dir', 'debug',
}  # fmt: skip
# Values that `distinctive` could not think of.
DISTINCTIVE = {
  'environment_name': 'breakout',
  'jax_platform_name': 'cpu',
  'shards': (5, 7),
  'num_iterations': 3,
  'padding': 'VALID',
  'num_mixtures': 5,
  'mode': 'binary',
  'vmax': 3.5,  # which float32 holds exactly
}


def distinctive(config_class: type, flipped: str | None) -> Any:
  """A Config with another value in each field, of flags without values only in `flipped`."""
  values: dict[str, Any] = {}
  for number, field in enumerate(dataclasses.fields(config_class), 1):
    kinds = typing.get_args(field.type) or (field.type,)
    if field.name in DISTINCTIVE:
      values[field.name] = DISTINCTIVE[field.name]
    elif bool in kinds:
      values[field.name] = field.default != (field.name == flipped)
    elif int in kinds:
      values[field.name] = (field.default or 0) + 1000 + number
    elif float in kinds:
      values[field.name] = (field.default or 1.0) * (0.5 + number / 100)
    elif field.default is None:
      values[field.name] = f'/of/{field.name}'
  if flipped:  # flags without values may exclude other flags
    values = {name: value for name, value in values.items() if name in (flipped, 'num_iterations')}
  return config_class(**values)


class Spies:
  """Calls of functions that are replaced, each with its arguments by parameter."""

  def __init__(self):
    self.calls: list[tuple[str, dict[str, Any]]] = []

  def of(self, name: str, function, answer=None):
    """A function that remembers its calls as `name`'s, and answers as another does."""
    signature = inspect.signature(function)

    def spy(*args, **kwargs):
      self.calls.append((name, dict(signature.bind(*args, **kwargs).arguments)))
      return (answer or function)(*args, **kwargs)

    return spy

  def arguments(self, name: str) -> list[dict[str, Any]]:
    return [arguments for called, arguments in self.calls if called == name]


OPTIMIZER = optax.identity()
OPTIMIZERS = [
  name
  for name, function in inspect.getmembers(optax, inspect.isfunction)
  if 'learning_rate' in inspect.signature(function).parameters
]


def run_with_spies(module, config, monkeypatch) -> Spies:
  """Runs `main` with everything replaced that it calls."""
  spies = Spies()
  progress = parts.Progress(num_resident_shards=2)
  environment = types.SimpleNamespace(
    action_spec=lambda: types.SimpleNamespace(num_values=NUM_ACTIONS)
  )
  logs = types.SimpleNamespace(
    describe=lambda: 'logs',
    mean_episode_return=12.5,
    resident=spies.of('resident', lambda iteration, num_iterations: f'data {iteration}'),
  )
  learner = types.SimpleNamespace()
  run = types.SimpleNamespace(
    progress=progress,
    resume=spies.of('resume', lambda agent, logs: progress),
  )

  def learn_iteration(agent, progress, num_updates, stop):
    seen = {'data': agent.data, 'iteration': progress.iteration, 'stop': stop}
    spies.calls.append(('data', seen))
    progress.add({'loss': 0.5}, num_updates, seconds=1.0)

  class Evaluator(contextlib.nullcontext):
    def evaluate(self, progress, stop):
      spies.calls.append(('evaluate', {'iteration': progress.iteration, 'stop': stop}))
      progress.begin_next_iteration()

    def finish(self, stop):
      spies.calls.append(('finish', {'stop': stop}))

  class_name = testing.agent_class(module.agent).__name__
  initialise = functools.partial(getattr(module.agent, class_name).__init__, None)
  for owner, name, called, answer in (
    (results, 'Results', 'Results', lambda *_, **__: run),
    (atari_env, 'AtariEnv', 'AtariEnv', lambda *_, **__: environment),
    (atari_env, 'rom_note', 'rom_note', lambda *_: 'another ROM'),
    (replay, 'Logs', 'Logs', lambda *_, **__: logs),
    (replay, 'cache_dir', 'cache_dir', lambda flag: f'cache {flag}'),
    (bundled, 'find_or_make', 'find_or_make', lambda name, game: name or f'logs of {game}'),
    (parts, 'learn_iteration', 'learn_iteration', learn_iteration),
    (seeds, 'Seeds', 'Seeds', lambda agent, _: agent),
    (evaluation, 'Evaluator', 'Evaluator', lambda *_: Evaluator()),
    (jax.random, 'PRNGKey', 'PRNGKey', lambda seed: f'key of {seed}'),
    *((networks, x, 'network', lambda *_, **__: 'network') for x in vars(networks)
      if x.endswith('_network')),
    *((optax, x, 'optimizer', lambda *_, **__: OPTIMIZER) for x in OPTIMIZERS),
  ):  # fmt: skip
    monkeypatch.setattr(owner, name, spies.of(called, getattr(owner, name), answer))
  spy = spies.of('agent', initialise, lambda **_: learner)
  monkeypatch.setattr(module.agent, class_name, spy)
  module.main(config)
  return spies


@every_agent
def test_every_flag_arrives_under_its_name(agent, monkeypatch):
  module = testing.run_atari(agent)
  fields = {field.name: field for field in dataclasses.fields(module.Config)}
  switches = [name for name, field in fields.items() if field.type is bool and name != 'debug']
  for flipped in (None, *switches):
    config = distinctive(module.Config, flipped)
    with monkeypatch.context() as patch:
      spies = run_with_spies(module, config, patch)
    for name in fields.keys() - ELSEWHERE:
      value = getattr(config, name)
      for function, parameter, *which in PLACES.get(name, [(x, name) for x in OWN_NAMES]):
        if flipped and name == 'replay_dir':
          value = 'logs of pong'
        if flipped and name == 'replay_cache_dir':
          value = None
        given = [x[parameter] for x in spies.arguments(function) if parameter in x]
        for part in which:
          given = [part(x) for x in given]
        assert all(x == value for x in given), f'{parameter} of {function} is not --{name}'
        if name in PLACES:
          assert given and len(given) == len(spies.arguments(function)), f'--{name} not given'
      if name not in PLACES:
        seen = [x for place in OWN_NAMES for x in spies.arguments(place) if name in x]
        assert seen, f'--{name} arrives nowhere'
    (made,) = spies.arguments('Results')
    assert made['config'] is config and made['agent_name'] == agent


@every_agent
def test_main_passes_on_what_it_makes(agent, monkeypatch, caplog):
  module = testing.run_atari(agent)
  config = distinctive(module.Config, None)
  with monkeypatch.context() as patch:  # our own logs are played with the ROM that there is here
    run_with_spies(module, dataclasses.replace(config, replay_dir='demo'), patch)
  assert 'another ROM' not in caplog.messages
  spies = run_with_spies(module, config, monkeypatch)
  assert spies.arguments('rom_note') == [
    {'environment_name': config.environment_name, 'rom_dir': config.rom_dir}
  ]
  assert caplog.messages.count('another ROM') == 1
  (logs,) = spies.arguments('Logs')
  assert logs['num_actions'] == NUM_ACTIONS and logs['num_resident_shards'] == 2
  assert logs['cache_dir'] == f'cache {config.replay_cache_dir}'
  (made,) = spies.arguments('agent')
  assert made['network'] == 'network'
  assert made['optimizer'] == OPTIMIZER or agent not in DEFAULTS  # a fork may chain others to it
  assert made['rng_key'] == f'key of {config.seed}' and made['data'] is None
  for arguments in spies.arguments('network'):
    assert arguments['num_actions'] == NUM_ACTIONS
  (several,) = spies.arguments('Seeds')
  assert several['seeds'] == range(config.seed, config.seed + config.num_seeds)
  assert all(x['agent'] is several['agent'] for x in spies.arguments('resume'))
  # Each iteration learns from its own shards, then is evaluated.
  iterations = [1, 2, 3]
  learnt = [(x['data'], x['iteration']) for x in spies.arguments('data')]
  assert learnt == [(f'data {i}', i) for i in iterations]
  assert [x['iteration'] for x in spies.arguments('evaluate')] == iterations
  order = ('data', 'evaluate', 'finish')
  called = [(name, x['stop']) for name, x in spies.calls if name in order]
  assert [name for name, _ in called] == [*('data', 'evaluate') * 3, 'finish']
  assert len({id(stop) for _, stop in called}) == 1
  # What evaluates makes agents and environments like those here, as its workers do.
  (evaluator,) = spies.arguments('Evaluator')
  assert evaluator['config'] is config and evaluator['dataset_episode_return'] == 12.5
  (logged_in,) = spies.arguments('AtariEnv')
  evaluator['make_environment'](seed=5)
  assert spies.arguments('AtariEnv')[1] == {**logged_in, 'seed': 5}
  evaluator['make_agent']()
  (_, actor) = spies.arguments('agent')
  assert actor['data'] is None
  same = made.keys() - {'data', 'processor'}  # processors are of episodes
  assert actor.keys() == made.keys() and all(np.array_equal(actor[x], made[x]) for x in same)


# Making an agent as its run_atari does, but with other settings.


@pytest.fixture(scope='session')
def data(tmp_path_factory):
  """Noise, so that no two transitions are equal."""
  directory = tmp_path_factory.mktemp('noise')
  testing.write_noise(directory, 1)
  return replay.load(directory, num_actions=NUM_ACTIONS, with_probabilities=True)


@pytest.fixture(scope='session')
def light(data):
  """A block in which networks and batches take next to no compiling; all batches are noted."""
  rows, batches = replay.valid_rows(data), []

  def sampler(everything):
    def sample(data, rng_key, batch_size):
      chosen = jax.random.randint(rng_key, (batch_size,), 0, len(rows))
      batches.append(jax.tree.map(lambda x: x[chosen], everything))
      return batches[-1]

    return sample

  sample = sampler(replay.gather(data, rows))
  sample_windows = sampler(replay.gather_windows(data, rows))

  @contextlib.contextmanager
  def block():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(networks, 'nature_torso', testing.small_torso)
      patch.setattr(replay, 'sample', sample)
      patch.setattr(replay, 'sample_windows', sample_windows)
      yield batches

  return block


class Made(NamedTuple):
  learner: Any
  settings: dict[str, Any]  # what its constructor was given


def make(agent: str, data, flags: dict[str, Any], **replaced) -> Made:
  """Makes an agent with these flags, and settings of its constructor replaced."""
  module = testing.run_atari(agent)
  config = module.Config(**testing.known_flags(module.Config, flags))
  agent_class = testing.agent_class(module.agent)
  settings = {}

  def construct(**given):
    settings.update(given)
    for name, value in replaced.items():
      settings[name] = value(given[name]) if callable(value) else value
    return agent_class(**settings)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, 'nature_torso', testing.small_torso)
    patch.setattr(module.agent, agent_class.__name__, construct)
    return Made(module.make_agent(config, NUM_ACTIONS, data), settings)


# Learning.


@every_agent
def test_the_optimizers_first_two_steps_by_hand(agent, data):
  """Of gradients 3 and then -1."""
  if agent not in DEFAULTS:
    pytest.skip('a fork, whose optimizer may be any')
  flags = {
    'learning_rate': 0.5, 'adam_epsilon': 0.25, 'rmsprop_decay': 0.75, 'rmsprop_epsilon': 0.125,
  }  # fmt: skip
  optimizer = make(agent, data, flags).settings['optimizer']
  state = optimizer.init(jnp.zeros(()))
  first, state = optimizer.update(jnp.float32(3.0), state, jnp.zeros(()))
  second, _ = optimizer.update(jnp.float32(-1.0), state, jnp.zeros(()))
  if hasattr(testing.run_atari(agent).Config, 'rmsprop_decay'):
    # Mean square 0.75 + 0.25 * 9 = 3 and mean 0.75; then 2.25 + 0.25 = 2.5 and 0.5625 - 0.25.
    assert first == pytest.approx(-0.5 * 3 / np.sqrt(3 - 0.5625 + 0.125), rel=1e-6)
    assert second == pytest.approx(0.5 / np.sqrt(2.5 - 0.3125**2 + 0.125), rel=1e-6)
  else:
    # Moments without bias 3 and 9; then (0.9 * 0.3 - 0.1) / 0.19 and (0.999 * 9 + 1) / 1.999.
    assert first == pytest.approx(-0.5 * 3 / (3 + 0.25), rel=1e-5)
    assert second == pytest.approx(-0.5 * (0.17 / 0.19) / (np.sqrt(9.991 / 1.999) + 0.25), rel=1e-5)


# The steps of gradient descent whose size depends on their number, which only the state knows.
STEP_SIZES = (0.0, 0.01, 0.02, 0.01, 0.0, 0.01, 0.01)
PERIOD = 3


def stepwise_sgd(_) -> optax.GradientTransformation:
  # Some networks' gradients are large: they take grey levels from 0 to 255.
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.sgd(lambda count: jnp.array(STEP_SIZES)[count])
  )


class Update(NamedTuple):
  """One of the first seven updates of an agent."""

  before: Any
  batch: replay.Transition | replay.Windows
  losses: np.ndarray  # [batch_size]
  metrics: dict[str, jax.Array]
  after: Any


class Recorded(NamedTuple):
  made: Made
  updates: list[Update]
  repeated: tuple  # of the first one again, after the others: state and metrics


@pytest.fixture(scope='session')
def recorded(data, light):
  @functools.cache
  def record(agent: str) -> Recorded:
    module, losses = testing.run_atari(agent), []
    loss = module.agent.loss

    def noted_loss(*args, **kwargs):
      answer = loss(*args, **kwargs)
      jax.debug.callback(losses.append, answer)
      return answer

    flags = {'batch_size': 5, 'target_network_update_period': PERIOD}
    made = make(agent, data, flags, optimizer=stepwise_sgd)
    with light() as batches, pytest.MonkeyPatch.context() as patch:
      patch.setattr(module.agent, 'loss', noted_loss)

      @jax.jit
      def update(state, data):
        state, metrics = made.learner.update(state, data)
        return state, metrics, batches[-1]

      first = before = made.learner.initial_state(jax.random.PRNGKey(2))
      updates = []
      for _ in STEP_SIZES:
        after, metrics, batch = update(before, data)
        jax.effects_barrier()
        updates.append(Update(before, batch, np.asarray(losses[-1]), metrics, after))
        before = after
      return Recorded(made, updates, update(first, data)[:2])

  return record


def acted_in(batch) -> tuple[jax.Array, jax.Array]:
  """The states that a batch of transitions or windows begins with, and the actions logged there."""
  if isinstance(batch, replay.Windows):
    return batch.s[:, 0], batch.a[:, 0]
  return batch.s_tm1, batch.a_tm1


def equal(a, b) -> bool:
  """Whether two trees of parameters are."""
  return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@every_agent
def test_the_target_is_copied_every_period_and_at_no_other_time(agent, recorded):
  updates = recorded(agent).updates
  for number, (before, _, _, _, after) in enumerate(updates, 1):
    assert after.num_updates == number
    if not hasattr(before, 'target_params'):
      continue
    if number == 1:
      assert equal(before.target_params, before.online_params)
    copied = number % PERIOD == 0
    assert equal(after.target_params, after.online_params if copied else before.target_params)
    assert copied or number < 2 or not equal(after.target_params, after.online_params)


@every_agent
def test_the_optimizers_state_is_carried(agent, recorded):
  for (before, _, _, _, after), size in zip(recorded(agent).updates, STEP_SIZES, strict=True):
    assert equal(before.online_params, after.online_params) == (size == 0)


@every_agent
def test_batches_are_new_in_every_update(agent, recorded):
  batches = [acted_in(update.batch) for update in recorded(agent).updates]
  assert all(len(actions) == 5 for _, actions in batches)
  seen = {np.asarray(states).tobytes() for states, _ in batches}
  assert len(seen) == len(batches)
  keys = {np.asarray(update.before.rng_key).tobytes() for update in recorded(agent).updates}
  assert len(keys) == len(batches)


# What metrics say, recomputed from the values [B, A] of a batch and the logged actions [B].
METRICS = {
  'q_logged_action': lambda q, actions: np.mean(q[np.arange(len(q)), actions]),
  'q_max': lambda q, _: np.mean(np.max(q, axis=1)),
  'conservative_loss': lambda q, actions: np.mean(
    np.log(np.sum(np.exp(q), axis=1)) - q[np.arange(len(q)), actions]
  ),
}


def q_values(network: hk.Transformed, params: hk.Params, frames: jax.Array) -> np.ndarray:
  """The network's values [B, A]; of several networks, stacked along a first axis, the mean."""
  one = jax.eval_shape(network.init, jax.random.PRNGKey(0), frames)
  if jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, one):
    return np.asarray(network.apply(params, frames).q_values)
  apply = jax.vmap(network.apply, in_axes=(0, None))
  return np.mean(apply(params, frames).q_values, axis=0)


@every_agent
def test_metrics_are_what_they_say(agent, recorded, light):
  made, updates, _ = recorded(agent)
  for before, batch, losses, metrics, _ in updates:
    assert losses.shape == (5,)
    np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-5)
    states, actions = acted_in(batch)
    for name in METRICS.keys() & metrics.keys():
      with light():
        q = q_values(made.settings['network'], before.online_params, states)
      want = METRICS[name](q, actions)
      np.testing.assert_allclose(metrics[name], want, rtol=1e-4, atol=1e-6)


@every_agent
def test_acting_and_learning_draw_from_keys_of_their_own(agent, data):
  learner = make(agent, data, {}, network=table_network).learner
  assert not np.array_equal(learner._act_key, learner.get_state().rng_key)


@every_agent
def test_update_and_initial_state_are_functions_of_their_arguments(agent, recorded, light):
  made, updates, repeated = recorded(agent)
  chex.assert_trees_all_equal(repeated, (updates[0].after, updates[0].metrics))
  with light():
    again, other = (made.learner.initial_state(jax.random.PRNGKey(key)) for key in (2, 3))
  chex.assert_trees_all_equal(again, updates[0].before)
  assert not equal(again.online_params, other.online_params)
  assert not np.array_equal(again.rng_key, other.rng_key)


@every_agent
def test_learn_is_so_many_updates_and_compiles_once(agent, recorded, light, monkeypatch):
  agent_module, traces = testing.run_atari(agent).agent, []
  loss = agent_module.loss
  monkeypatch.setattr(agent_module, 'loss', lambda *args: traces.append(1) or loss(*args))
  made, updates, _ = recorded(agent)
  learner = made.learner
  learner.set_state(updates[0].before)
  with light():
    metrics = learner.learn(2)
    for name, value in metrics.items():
      assert value == pytest.approx(np.mean([u.metrics[name] for u in updates[:2]]), rel=1e-4)
    num_traces = len(traces)
    state = learner.get_state()
    chex.assert_trees_all_close(state, updates[1].after, rtol=1e-4, atol=1e-6)
    # A state is a copy, and going on from it repeats what came after it, bit for bit.
    kept = jax.tree.map(np.copy, state)
    learner.learn(3)
    end = learner.get_state()
    chex.assert_trees_all_equal(state, kept)
    assert not equal(state.online_params, end.online_params)
    learner.set_state(state)
    learner.learn(3)
    chex.assert_trees_all_equal(learner.get_state(), end)
  assert num_traces and len(traces) == num_traces


@every_agent
def test_several_seeds_learn_together_as_each_alone(agent, recorded, light, data):
  learner, updates = recorded(agent).made.learner, recorded(agent).updates
  with light():
    states = [learner.initial_state(jax.random.PRNGKey(seed)) for seed in (2, 3)]
    states, metrics = seeds.learn_together(learner.update)(states, data, 2)
  chex.assert_trees_all_close(states[0], updates[1].after, rtol=1e-3, atol=1e-5)
  for name, (value, other) in metrics.items():
    alone = np.mean([update.metrics[name] for update in updates[:2]])
    assert value == pytest.approx(alone, rel=1e-3, abs=1e-5) and other != value
  assert not equal(states[0].online_params, states[1].online_params)


# Acting, on what all outputs of the network agree on.


def table_network(network: hk.Transformed) -> hk.Transformed:
  """Another network's outputs, each of an action's the entry of a table [2, A] for the state."""

  def init(rng_key, frames):
    del rng_key, frames
    return {'table': jnp.zeros((2, NUM_ACTIONS))}

  def apply(params, frames):
    rows = params['table'][testing.states(frames)]

    def outputs(frames):
      return network.apply(network.init(jax.random.PRNGKey(0), frames), frames)

    def fill(like):
      if NUM_ACTIONS not in like.shape[1:]:
        return jnp.zeros(like.shape, like.dtype)
      axis = like.shape.index(NUM_ACTIONS, 1)
      others = [i for i in range(1, len(like.shape)) if i != axis]
      return jnp.broadcast_to(jnp.expand_dims(rows, others), like.shape)

    return jax.tree.map(fill, jax.eval_shape(outputs, frames))

  return hk.Transformed(init, apply)


# The best actions are 4 in state 0 and the last one in state 1.
TABLE = np.array([[-3, -2, -4, -1, 2, -2, -1], [-1, -4, -2, -3, -1, -2, 1]], np.float32)
BEST = (4, 6)


@pytest.fixture(scope='session')
def actors(data):
  """Each agent, acting on the table with a rate of random actions."""

  @functools.cache
  def make_actor(agent: str, epsilon: float):
    made = make(agent, data, {'eval_epsilon': epsilon}, network=table_network)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(networks, 'nature_torso', testing.small_torso)
      state = made.learner.get_state()
      # There may be several networks.
      params = jax.tree.map(lambda like: np.broadcast_to(TABLE, like.shape), state.online_params)
      made.learner.set_state(state._replace(online_params=params))
    return made.learner

  return make_actor


@every_agent
def test_actions_are_the_best_ones_but_for_random_ones(agent, actors):
  keys = jax.random.split(jax.random.PRNGKey(0), 20_000)
  for epsilon in (0.0, 0.3, 1.0):
    actor = actors(agent, epsilon)
    act = jax.jit(jax.vmap(actor.act, in_axes=(None, 0, None)))
    for state, best in enumerate(BEST):
      frames = np.full((84, 84, 4), 10 * (state + 1), np.uint8)
      next_keys, actions, _ = act(actor.get_state().online_params, keys, frames)
      rates = np.bincount(actions, minlength=NUM_ACTIONS) / len(keys)
      want = np.full(NUM_ACTIONS, epsilon / NUM_ACTIONS)
      want[best] += 1 - epsilon
      # Five standard deviations.
      assert (np.abs(rates - want) <= 5 * np.sqrt(want * (1 - want) / len(keys))).all(), rates
      assert len(np.unique(np.concatenate([keys, next_keys]), axis=0)) == 2 * len(keys)


class TwoScreens(dm_env.Environment):
  """Shows state 0 in four frames and state 1 in the next four; never ends."""

  def reset(self):
    self._frame = 0
    return dm_env.restart(np.full((210, 160), 10, np.uint8))

  def step(self, action):
    self._frame += 1
    grey = 10 if self._frame // 4 % 2 == 0 else 20
    return dm_env.transition(0.0, np.full((210, 160), grey, np.uint8))

  def observation_spec(self):
    raise NotImplementedError

  action_spec = observation_spec


def play(learner, key: int, num_frames: int) -> list[tuple[int, float | None]]:
  """The answers to the first frames, after a reset with a key."""
  learner.reset(jax.random.PRNGKey(key))
  loop = parts.run_loop(learner, TwoScreens())
  return [(next(loop)[3], learner.statistics.get('state_value')) for _ in range(num_frames)]


@every_agent
def test_an_action_is_repeated_until_the_next_decision(agent, actors):
  # A screen changes with frame 4 of a repeat; the maximum of the last two shows it from then on.
  answers = play(actors(agent, 0.0), 0, 16)
  assert [action for action, _ in answers] == [BEST[0]] * 4 + [BEST[1]] * 12
  values = [value for _, value in answers]
  assert values[0] is None or values == [2.0] * 4 + [1.0] * 12


class Flicker(TwoScreens):
  """Shows the states at random, for as long as its seed says; an action is its reward."""

  def __init__(self, *, seed):
    self.seed(seed)

  def seed(self, seed):
    self._rng = np.random.default_rng(seed)

  def reset(self):
    self._left = self._rng.integers(1, 200)
    return dm_env.restart(self._screen())

  def step(self, action):
    self._left -= 1
    if self._left:
      return dm_env.transition(float(action), self._screen())
    return dm_env.termination(float(action), self._screen())

  def _screen(self):
    return np.full((210, 160), self._rng.choice([10, 20]), np.uint8)


@every_agent
def test_several_play_together_as_each_alone(agent, actors):
  learner = actors(agent, 0.3)
  players = playing.Players(learner, Flicker, 3)
  players.set_params(learner.get_state().online_params)
  for iteration in (1, 2):
    together = players.play((5, iteration, 0))
    assert len({episode.num_frames for episode in together.values()}) == 3
    for number, episode in together.items():
      alone = playing.play_episodes([learner], [Flicker(seed=0)], (5, iteration, number))
      assert alone[number] == episode


@every_agent
def test_acting_is_a_function_of_the_key(agent, actors):
  learner = actors(agent, 1.0)
  plays = [[action for action, _ in play(learner, key, 400)] for key in (0, 0, 1)]
  assert plays[0] == plays[1] != plays[2]
  for actions in plays:
    assert np.array_equal(np.repeat(actions[::4], 4), actions)
  assert {*plays[0]} == {*range(NUM_ACTIONS)}
