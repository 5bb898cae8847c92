"""Serves Tianshou's algorithms, learning from logged play, to `benchmarks.learn`.

This runs in Tianshou's own environment (README.md says how to make it) and imports nothing of ours;
protocol.py says what is asked and answered. Networks, losses, replay and updates are Tianshou's,
put together as in its examples for Atari. Networks have VALID padding. Optimisers are of the kind
that ours are.

Algorithms: dqn and c51 (double, as C51 always is there), qrdqn, cql (double, as always there), bcq,
crr, bc (OfflineImitationLearning).
"""

import gymnasium as gym
import numpy as np
import protocol
from logged_play import BATCH_SIZE, STACK, first_rows, learner_parser
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
from tianshou.env.atari.atari_network import C51Net, DQNet, QRDQNet
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from tianshou.utils.torch_utils import policy_within_training_step


class SinglePassQRDQN(QRDQN):
  """QR-DQN as in its paper: the target network chooses. Tianshou's chooses with the online one."""

  def _target_q(self, buffer, indices):
    batch = Batch(obs=buffer[indices].obs_next, info=[None] * len(indices))
    result = self.policy(batch, model=self.model_old)
    return result.logits[np.arange(len(indices)), result.act, :]


def make_algorithm(name, num_actions):
  """Makes an algorithm at the beginning of its learning, by its name."""
  space = gym.spaces.Discrete(num_actions)
  shape = {'c': STACK, 'h': 84, 'w': 84, 'action_shape': num_actions}
  adam = AdamOptimizerFactory(lr=5e-5)
  learning = {'gamma': 0.99, 'target_update_freq': 2000}
  if name == 'dqn':
    return DQN(
      policy=DiscreteQLearningPolicy(model=DQNet(**shape), action_space=space),
      optim=RMSpropOptimizerFactory(lr=2.5e-4, alpha=0.95, eps=1e-5, centered=True),
      is_double=True,
      huber_loss_delta=1.0,
      **learning,
    )
  if name in ('qrdqn', 'cql'):
    policy = QRDQNPolicy(model=QRDQNet(num_quantiles=200, **shape), action_space=space)
    algorithm = {'qrdqn': SinglePassQRDQN, 'cql': DiscreteCQL}[name]
    return algorithm(policy=policy, optim=adam, num_quantiles=200, **learning)
  if name == 'c51':
    return C51(policy=C51Policy(C51Net(**shape), space), optim=adam, **learning)
  if name == 'bc':
    policy = ImitationPolicy(actor=DQNet(**shape), action_space=space)
    return OfflineImitationLearning(policy=policy, optim=adam)
  features = DQNet(features_only=True, **shape)
  head = {'preprocess_net': features, 'hidden_sizes': [512]}
  actor = DiscreteActor(action_shape=num_actions, softmax_output=False, **head)
  if name == 'bcq':
    model = DiscreteActor(action_shape=num_actions, softmax_output=False, **head)
    policy = DiscreteBCQPolicy(model=model, imitator=actor, action_space=space)
    return DiscreteBCQ(policy=policy, optim=adam, **learning)
  if name == 'crr':
    policy = DiscreteActorPolicy(actor=actor, action_space=space)
    critic = DiscreteCritic(last_size=num_actions, **head)
    return DiscreteCRR(policy=policy, critic=critic, optim=adam, **learning)
  raise ValueError(f'There is no {name} here.')


def main():
  """Serves updates until the input ends."""
  args = learner_parser(__doc__).parse_args()

  replies = protocol.take_stdout()
  rows = first_rows(args.replay_dir, args.transitions)
  buffer = tianshou_buffer(rows, len(rows))

  def make(name):
    algorithm = make_algorithm(name, args.num_actions)

    def learn(updates):
      with policy_within_training_step(algorithm.policy):
        for _ in range(updates):
          algorithm.update(buffer=buffer, sample_size=BATCH_SIZE)

    return learn

  protocol.serve_learners(replies, ('tianshou', 'torch', 'numpy'), make)


if __name__ == '__main__':
  main()
