"""Serves d3rlpy's algorithms, learning from logged play, to `benchmarks.learn` and `peers_study`.

This runs in d3rlpy's own environment (README.md says how to make it) and imports nothing of ours;
protocol.py says what is asked and answered. Networks, losses, replay and updates are d3rlpy's.
Networks have VALID padding, its default. Optimisers are of the kind that ours are.

Algorithms: dqn (double), qrdqn, cql (quantiles; double, as always there), bcq, bc.

Its replay has black frames before an episode's first one, as ours. Its n-step return ends with the
episode: the transition has as many steps as there were, of which its discount is a power, and what
was terminal has no value after it. Where the logs are cut off within an episode, the last state
logged is only one to go to.
"""

import dataclasses
import types

import d3rlpy
import numpy as np
import protocol
import torch
from d3rlpy.algos import (
  DiscreteBCConfig,
  DiscreteBCQConfig,
  DiscreteCQLConfig,
  DoubleDQNConfig,
  DQNConfig,
)
from d3rlpy.dataset import MultiStepTransitionPicker
from d3rlpy.dataset.utils import stack_recent_observations
from d3rlpy.models.torch.q_functions.utility import pick_quantile_value_by_action
from logged_play import BATCH_SIZE, FRAME_SHAPE, STACK, first_rows, learner_parser
from replays import d3rlpy_buffer

# d3rlpy's own values, by the names of our flags, of reproductions/offline/discrete_*.py of its
# repository at version 2.8.1, which are for 1% of the DQN Replay Dataset. Its classes' defaults are
# others: a mean for a distribution, Adam's step 6.25e-5 and epsilon 1e-8, alpha 1, the target
# copied every 8,000 updates, a penalty of 0.5.
_OWN = {'learning_rate': 5e-5, 'adam_epsilon': 0.01 / 32, 'target_network_update_period': 2000}
OWN = {
  'cql': {**_OWN, 'num_quantiles': 200, 'alpha': 4.0},
  'bcq': {**_OWN, 'num_quantiles': 200, 'threshold': 0.3, 'logits_penalty': 0.01},
}


class StackedMultiStepPicker(MultiStepTransitionPicker):
  """d3rlpy's n-step transitions, with frames stacked as its FrameStackTransitionPicker does it."""

  def __call__(self, episode, index):
    transition = super().__call__(episode, index)

    def stack(index):
      return stack_recent_observations(episode.observations, index, STACK)

    observation = stack(index)
    return dataclasses.replace(
      transition,
      observation=observation,
      next_observation=(
        np.zeros_like(observation) if transition.terminal else stack(index + transition.interval)
      ),
    )


def single_pass_target(self, batch):
  """Quantiles of the target network's best action. d3rlpy's own passes through it twice."""
  with torch.no_grad():
    output = self._modules.targ_q_funcs[0](batch.next_observations)
    return pick_quantile_value_by_action(output.quantiles, output.q_value.argmax(dim=1))


def make_algorithm(name, num_actions, values):
  """Makes an algorithm at the beginning of its learning.

  Args:
    name: See above.
    num_actions: The size of the game's action set.
    values: Hyperparameters by the names of our flags, and `unit_greys`: Whether grey levels go in
      from 0 to 1, not to 255. None: `OWN`.
  """
  values = OWN[name] if values is None else values
  adam = d3rlpy.optimizers.AdamFactory(eps=values.get('adam_epsilon', 1e-8))
  rmsprop = d3rlpy.optimizers.RMSpropFactory(eps=1e-5)  # centered, decay 0.95
  settings = {'optim_factory': rmsprop if name == 'dqn' else adam}
  if name in ('qrdqn', 'cql') or 'num_quantiles' in values:
    num_quantiles = values.get('num_quantiles', 200)
    settings['q_func_factory'] = d3rlpy.models.QRQFunctionFactory(n_quantiles=num_quantiles)
  if name != 'bc':
    settings['target_update_interval'] = values['target_network_update_period']
  if name == 'cql':
    settings['alpha'] = values.get('alpha', 1.0)
  if name == 'bcq':
    settings['action_flexibility'] = values.get('threshold', 0.3)
    settings['beta'] = values.get('logits_penalty', 0.5)
  if values.get('unit_greys', True):
    settings['observation_scaler'] = d3rlpy.preprocessing.PixelObservationScaler()
  config_class = {
    'dqn': DoubleDQNConfig,
    'qrdqn': DQNConfig,
    'cql': DiscreteCQLConfig,
    'bcq': DiscreteBCQConfig,
    'bc': DiscreteBCConfig,
  }[name]
  config = config_class(batch_size=BATCH_SIZE, learning_rate=values['learning_rate'], **settings)
  algorithm = config.create(device=False)
  algorithm.create_impl((STACK, *FRAME_SHAPE), num_actions)
  if name == 'qrdqn':
    algorithm.impl.compute_target = types.MethodType(single_pass_target, algorithm.impl)
  return algorithm


def main():
  """Serves until the input ends."""
  args = learner_parser(__doc__).parse_args()

  replies = protocol.take_stdout()
  d3rlpy.seed(args.seed)
  rows = first_rows(args.replay_dir, args.transitions)
  n_step = (args.values or {}).get('n_step', 1)
  picker = StackedMultiStepPicker(n_step, gamma=0.99) if n_step > 1 else None
  buffer, _ = d3rlpy_buffer(rows, len(rows), picker)
  del rows  # and with them the shards' arrays

  def make(name):
    algorithm = make_algorithm(name, args.num_actions, args.values)

    def learn(updates):
      losses = [
        algorithm.update(buffer.sample_transition_batch(BATCH_SIZE))['loss'] for _ in range(updates)
      ]
      return float(np.mean(losses))

    def act(stacks):
      stacks = np.frombuffer(stacks, np.uint8).reshape(-1, STACK, *FRAME_SHAPE)
      return algorithm.predict(stacks).tolist()

    return protocol.Learner(learn, act)

  facts = {'first_frame_is_repeated': False, 'threads': torch.get_num_threads(), 'own': OWN}
  protocol.serve_learners(replies, ('d3rlpy', 'torch', 'numpy'), make, facts)


if __name__ == '__main__':
  main()
