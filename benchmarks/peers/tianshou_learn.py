"""Serves Tianshou's algorithms, learning from logged play, to `benchmarks.learn` and `peers_study`.

This runs in Tianshou's own environment (README.md says how to make it) and imports nothing of ours;
protocol.py says what is asked and answered. Networks, losses, replay and updates are Tianshou's,
put together as in its examples for Atari. Networks have VALID padding. Optimisers are of the kind
that ours are.

Algorithms: dqn and c51 (double, as C51 always is there), qrdqn, cql (double, as always there), bcq,
crr, bc (OfflineImitationLearning).

Its replay repeats an episode's first frame before it, where ours are black. Its n-step return ends
with the episode: `next` of an episode's last step is that step itself, from which on the return is
begun anew, the discount is that of as many steps as there were, and what was terminal has no value
after it. Where the logs are cut off within an episode, the value is that of the last state itself,
not of the one after it, which is not logged: n rows of a shard. CRR knows one step only.
"""

import gymnasium as gym
import numpy as np
import protocol
import torch
from logged_play import BATCH_SIZE, FRAME_SHAPE, STACK, first_rows, learner_parser
from replays import tianshou_buffer
from tianshou.algorithm import (
  C51,
  DQN,
  QRDQN,
  DiscreteBCQ,
  DiscreteCQL,
  DiscreteCRR,
)
from tianshou.algorithm.imitation.discrete_bcq import DiscreteBCQPolicy
from tianshou.algorithm.imitation.imitation_base import ImitationPolicy, OfflineImitationLearning
from tianshou.algorithm.modelfree.c51 import C51Policy
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.modelfree.qrdqn import QRDQNPolicy
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, RMSpropOptimizerFactory
from tianshou.data import Batch
from tianshou.env.atari.atari_network import (
  C51Net,
  DQNet,
  QRDQNet,
  ScaledObsInputActionReprNet,
)
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode

# Tianshou's own values, by the names of our flags, of examples/offline/atari_*.py of release 2.0.1.
# What they leave to its classes is theirs below as well, such as Adam's epsilon.
OWN = {
  'cql': {'learning_rate': 1e-4, 'target_network_update_period': 500, 'alpha': 10.0},
  'bcq': {'learning_rate': 6.25e-5, 'target_network_update_period': 8000},
  'crr': {'learning_rate': 1e-4, 'target_network_update_period': 500},
  'bc': {'learning_rate': 1e-4},
}


class SinglePassQRDQN(QRDQN):
  """QR-DQN as in its paper: the target network chooses. Tianshou's chooses with the online one."""

  def _target_q(self, buffer, indices):
    batch = Batch(obs=buffer[indices].obs_next, info=[None] * len(indices))
    result = self.policy(batch, model=self.model_old)
    return result.logits[np.arange(len(indices)), result.act, :]


def make_algorithm(name, num_actions, values):
  """Makes an algorithm at the beginning of its learning.

  Args:
    name: See above.
    num_actions: The size of the game's action set.
    values: Hyperparameters by the names of our flags, and `unit_greys`: Whether grey levels go in
      from 0 to 1, not to 255. None: `OWN`.
  """
  values = OWN[name] if values is None else values
  space = gym.spaces.Discrete(num_actions)
  shape = {'c': STACK, 'h': 84, 'w': 84, 'action_shape': num_actions}
  adam = AdamOptimizerFactory(lr=values['learning_rate'], eps=values.get('adam_epsilon', 1e-8))
  learning = {'gamma': 0.99, 'target_update_freq': values.get('target_network_update_period', 0)}
  n_step = {'n_step_return_horizon': values.get('n_step', 1)}

  def scaled(network):
    return ScaledObsInputActionReprNet(network) if values.get('unit_greys', False) else network

  if name == 'dqn':
    return DQN(
      policy=DiscreteQLearningPolicy(model=scaled(DQNet(**shape)), action_space=space),
      optim=RMSpropOptimizerFactory(lr=2.5e-4, alpha=0.95, eps=1e-5, centered=True),
      is_double=True,
      huber_loss_delta=1.0,
      **learning,
      **n_step,
    )
  if name in ('qrdqn', 'cql'):
    quantiles = {'num_quantiles': values.get('num_quantiles', 200)}
    policy = QRDQNPolicy(model=scaled(QRDQNet(**quantiles, **shape)), action_space=space)
    settings = {'policy': policy, 'optim': adam, **quantiles, **learning, **n_step}
    if name == 'qrdqn':
      return SinglePassQRDQN(**settings)
    return DiscreteCQL(min_q_weight=values.get('alpha', 10.0), **settings)
  if name == 'c51':
    policy = C51Policy(scaled(C51Net(**shape)), space)
    return C51(policy=policy, optim=adam, **learning, **n_step)
  if name == 'bc':
    policy = ImitationPolicy(actor=scaled(DQNet(**shape)), action_space=space)
    return OfflineImitationLearning(policy=policy, optim=adam)
  features = scaled(DQNet(features_only=True, **shape))
  head = {'preprocess_net': features, 'hidden_sizes': [512]}
  actor = DiscreteActor(action_shape=num_actions, softmax_output=False, **head)
  if name == 'bcq':
    policy = DiscreteBCQPolicy(
      model=DiscreteActor(action_shape=num_actions, softmax_output=False, **head),
      imitator=actor,
      action_space=space,
      unlikely_action_threshold=values.get('threshold', 0.3),
    )
    penalty = values.get('logits_penalty', 0.01)
    return DiscreteBCQ(
      policy=policy, optim=adam, imitation_logits_penalty=penalty, **learning, **n_step
    )
  if name == 'crr':
    # Acts by its best action; its own way is to sample.
    policy = DiscreteActorPolicy(actor=actor, action_space=space, deterministic_eval=True)
    return DiscreteCRR(
      policy=policy,
      critic=DiscreteCritic(last_size=num_actions, **head),
      optim=adam,
      policy_improvement_mode=values.get('mode', 'exp'),
      ratio_upper_bound=values.get('max_weight', 20.0),
      beta=values.get('beta', 1.0),
      min_q_weight=values.get('min_q_weight', 10.0),
      **learning,
    )
  raise ValueError(f'There is no {name} here.')


def main():
  """Serves until the input ends."""
  args = learner_parser(__doc__).parse_args()

  replies = protocol.take_stdout()
  np.random.seed(args.seed)
  torch.manual_seed(args.seed)
  rows = first_rows(args.replay_dir, args.transitions)
  buffer = tianshou_buffer(rows, len(rows), args.seed)
  del rows  # and with them the shards' arrays

  def make(name):
    algorithm = make_algorithm(name, args.num_actions, args.values)

    def learn(updates):
      with policy_within_training_step(algorithm.policy):
        losses = [
          algorithm.update(buffer=buffer, sample_size=BATCH_SIZE).loss for _ in range(updates)
        ]
      return float(np.mean(losses))

    def act(stacks):
      stacks = np.frombuffer(stacks, np.uint8).reshape(-1, STACK, *FRAME_SHAPE)
      with torch.no_grad(), torch_train_mode(algorithm.policy, False):
        return [int(action) for action in algorithm.policy(Batch(obs=stacks, info={})).act]

    return protocol.Learner(learn, act)

  facts = {'first_frame_is_repeated': True, 'threads': torch.get_num_threads(), 'own': OWN}
  protocol.serve_learners(replies, ('tianshou', 'torch', 'numpy'), make, facts)


if __name__ == '__main__':
  main()
