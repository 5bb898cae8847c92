"""Serves Tianshou's discrete CQL, learning from logged play, to a benchmark driver.

This runs in Tianshou's own environment (README.md says how to make it) and imports nothing of ours.
Network, loss, replay and update are Tianshou's, as in its examples/offline/atari_cql.py, with that
file's defaults (grey levels from 0 to 255; Adam 1e-4; target copied every 500 updates; 200
quantiles) but for the weight of the conservative term. Requests (see protocol.py):

  in   {"train": 500}                          updates of 32 transitions
  out  {"seconds": 12.3, "loss": 0.5}
  in   {"act": "..."}                          base64 of a stack [4, 84, 84] uint8, newest last
  out  {"action": 3}

Rewards are clipped to [-1, 1] when they are logged to its replay, as its Atari wrapper does.
"""

import argparse
import base64
import pathlib
import time

import gymnasium as gym
import numpy as np
import protocol
import torch
from logged_play import BATCH_SIZE, STACK, read_rows
from replays import tianshou_buffer
from tianshou.algorithm import DiscreteCQL
from tianshou.algorithm.modelfree.qrdqn import QRDQNPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch
from tianshou.env.atari.atari_network import QRDQNet
from tianshou.utils.torch_utils import policy_within_training_step


def main():
  """Serves until the input ends."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--replay_dir', type=pathlib.Path, required=True)
  parser.add_argument('--num_actions', type=int, default=6)
  parser.add_argument('--alpha', type=float, required=True, help='of the conservative term')
  parser.add_argument('--seed', type=int, default=1)
  args = parser.parse_args()

  replies = protocol.take_stdout()
  np.random.seed(args.seed)
  torch.manual_seed(args.seed)

  network = QRDQNet(c=STACK, h=84, w=84, action_shape=args.num_actions, num_quantiles=200)
  policy = QRDQNPolicy(model=network, action_space=gym.spaces.Discrete(args.num_actions))
  algorithm = DiscreteCQL(
    policy=policy,
    optim=AdamOptimizerFactory(lr=1e-4),
    min_q_weight=args.alpha,
    gamma=0.99,
    num_quantiles=200,
    n_step_return_horizon=1,
    target_update_freq=500,
  )
  rows = [
    (frame, action, np.clip(reward, -1, 1), terminal, last)
    for frame, action, reward, terminal, last in read_rows(args.replay_dir)
  ]
  buffer = tianshou_buffer(rows, len(rows))

  def train(updates):
    losses = []
    with policy_within_training_step(policy):
      for _ in range(updates):
        losses.append(algorithm.update(buffer=buffer, sample_size=BATCH_SIZE).loss)
    return float(np.mean(losses))

  def act(stack):
    with torch.no_grad():
      return int(policy(Batch(obs=stack[None], info={})).act[0])

  def answer(request):
    if 'train' in request:
      start = time.perf_counter()
      loss = train(request['train'])
      return {'seconds': time.perf_counter() - start, 'loss': loss}
    stack = np.frombuffer(base64.b64decode(request['act']), np.uint8).reshape(STACK, 84, 84)
    return {'action': act(stack)}

  facts = {'transitions': len(buffer), 'threads': torch.get_num_threads()}
  protocol.serve(replies, ('tianshou', 'torch', 'numpy'), facts, answer)


if __name__ == '__main__':
  main()
