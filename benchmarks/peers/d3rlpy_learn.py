"""Serves d3rlpy's algorithms, learning from logged play, to `benchmarks.learn`.

This runs in d3rlpy's own environment (README.md says how to make it) and imports nothing of ours;
protocol.py says what is asked and answered. Networks, losses, replay and updates are d3rlpy's.
Networks have VALID padding, its default. Optimisers are of the kind that ours are.

Algorithms: dqn (double), qrdqn, cql (quantiles; double, as always there), bcq, bc.
"""

import types

import d3rlpy
import protocol
import torch
from d3rlpy.algos import (
  DiscreteBCConfig,
  DiscreteBCQConfig,
  DiscreteCQLConfig,
  DoubleDQNConfig,
  DQNConfig,
)
from d3rlpy.models.torch.q_functions.utility import pick_quantile_value_by_action
from logged_play import BATCH_SIZE, STACK, first_rows, learner_parser
from replays import d3rlpy_buffer


def single_pass_target(self, batch):
  """Quantiles of the target network's best action. d3rlpy's own passes through it twice."""
  with torch.no_grad():
    output = self._modules.targ_q_funcs[0](batch.next_observations)
    return pick_quantile_value_by_action(output.quantiles, output.q_value.argmax(dim=1))


def make_algorithm(name, num_actions):
  """Makes an algorithm at the beginning of its learning, by its name."""
  rmsprop = d3rlpy.optimizers.RMSpropFactory(eps=1e-5)  # centered, decay 0.95
  quantiles = d3rlpy.models.QRQFunctionFactory(n_quantiles=200)
  config_class, settings = {
    'dqn': (DoubleDQNConfig, {'optim_factory': rmsprop, 'target_update_interval': 2000}),
    'qrdqn': (DQNConfig, {'q_func_factory': quantiles, 'target_update_interval': 2000}),
    'cql': (DiscreteCQLConfig, {'q_func_factory': quantiles, 'target_update_interval': 2000}),
    'bcq': (DiscreteBCQConfig, {'target_update_interval': 2000}),
    'bc': (DiscreteBCConfig, {}),
  }[name]
  config = config_class(
    batch_size=BATCH_SIZE,
    learning_rate=5e-5,
    observation_scaler=d3rlpy.preprocessing.PixelObservationScaler(),
    **settings,
  )
  algorithm = config.create(device=False)
  algorithm.create_impl((STACK, 84, 84), num_actions)
  if name == 'qrdqn':
    algorithm.impl.compute_target = types.MethodType(single_pass_target, algorithm.impl)
  return algorithm


def main():
  """Serves updates until the input ends."""
  args = learner_parser(__doc__).parse_args()

  replies = protocol.take_stdout()
  rows = first_rows(args.replay_dir, args.transitions)
  buffer, _ = d3rlpy_buffer(rows, len(rows))

  def make(name):
    algorithm = make_algorithm(name, args.num_actions)

    def learn(updates):
      for _ in range(updates):
        algorithm.update(buffer.sample_transition_batch(BATCH_SIZE))

    return learn

  protocol.serve_learners(replies, ('d3rlpy', 'torch', 'numpy'), make)


if __name__ == '__main__':
  main()
