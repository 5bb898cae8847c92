"""Serves Dopamine's DQN in its own loop of acting and learning to `benchmarks.online`.

This runs in Dopamine's virtual environment (README.md says how to make it) and imports nothing of
ours; protocol.py says how it is asked. A request is what to do, together, acting or learning, and
how many updates it is worth: four agent steps and an update each; those steps alone; those updates
alone. Environment, preprocessing, memory, agent and train step are Dopamine's, untouched.

  python dopamine_play.py --environment_name=pong --warmup_steps=5000 --capacity=100000
"""

import argparse
import time

import dopamine_learn  # first: it stands in for what Dopamine's Atari module imports
import protocol
from dopamine.discrete_domains import atari_lib

STEPS = 4  # an update


class Loop:
  """One episode after another, as Dopamine's Runner has it, a step at a time."""

  def __init__(self, environment, agent):
    self._environment, self._agent = environment, agent
    self._ended = True

  def step(self):
    """Plays an agent step; the agent learns when it is its turn."""
    if self._ended:
      self._action = self._agent.begin_episode(self._environment.reset())
    observation, reward, is_terminal, _ = self._environment.step(self._action)
    self._ended = is_terminal or self._environment.game_over
    reward = min(max(reward, -1), 1)
    if self._ended:
      self._agent.end_episode(reward, is_terminal)
    else:
      self._action = self._agent.step(reward, observation)


def main():
  """Serves until the input ends."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--environment_name', required=True, help='in snake_case')
  parser.add_argument('--warmup_steps', type=int, required=True)
  parser.add_argument('--capacity', type=int, required=True)
  args = parser.parse_args()
  replies = protocol.take_stdout()
  import jax

  name = ''.join(word.title() for word in args.environment_name.split('_'))
  environment = atari_lib.create_atari_environment(name)
  agent = dopamine_learn.make_agent('dqn', environment.action_space.n, args.capacity, seed=0)
  loop = Loop(environment, agent)

  def answer(request):
    # Its own switches: how many steps an update takes, which beyond any number are none.
    agent.update_period = {'together': STEPS, 'acting': 10**9, 'learning': 1}[request['do']]
    agent.training_steps = 1 if request['do'] == 'acting' else 0
    step, number = loop.step, STEPS * request['updates']
    if request['do'] == 'learning':
      step, number = agent._train_step, request['updates']  # pylint: disable=protected-access
    start = time.perf_counter()
    for _ in range(number):
      step()
    jax.block_until_ready((agent.online_params, agent.optimizer_state))
    return {'seconds': time.perf_counter() - start}

  # With all actions the network's, once the memory has some to sample from.
  agent.epsilon_train = 0.0
  agent.epsilon_fn = lambda *_: 0.0
  answer({'do': 'acting', 'updates': args.warmup_steps // STEPS})
  protocol.serve(replies, (*dopamine_learn.PACKAGES, 'ale-py', 'gymnasium'), {}, answer)


if __name__ == '__main__':
  main()
