"""Our CQL and Tianshou's discrete CQL on the same logs: wall time, and returns in our evaluation.

  python -m benchmarks.cql_side_by_side --peer_python=<venv>/bin/python --replay_dir=<Pong logs>

They take turns, a chunk of updates each; then each plays games of Pong with sticky actions in
`evaluation.evaluate`, with the same seed and epsilon. The batch and the weight of the conservative
term are the same; the rest is what each of them comes with (ours: run_atari.py), which differs:

                        ours                        Tianshou (peers/tianshou_cql.py)
  convolutions          SAME, 7744 x 512 after      VALID, 3136 x 512 after
  grey levels           0 to 1                      0 to 255
  next action           the target network's        the online network's
  Adam                  5e-5, epsilon 0.01 / 32     1e-4, epsilon 1e-8
  target copied every   2,000 updates               500 updates

So times are of unlike work: a pass of Tianshou's network takes 40% less arithmetic and half the
parameters, but it makes three in an update where ours makes two.
"""

import argparse
import base64
import functools

import dm_env
import jax
import numpy as np
import optax

from benchmarks import learn
from benchmarks.peers import protocol
from offline_zoo import atari_env, evaluation, networks, parts, playing, processors, replay
from offline_zoo.cql import agent, run_atari
from offline_zoo.logs import demo

ALPHA = 4.0  # for 1% of the data, as the README of CQL's authors says


class PeerAgent:
  """Acts as a peer says, epsilon-greedily, with our preprocessing."""

  def __init__(self, peer: protocol.Peer, num_actions: int, epsilon: float):
    self._peer = peer
    self._num_actions = num_actions
    self._epsilon = epsilon
    self._processor = processors.AtariProcessor()
    self._rng = np.random.default_rng(0)
    self.statistics = {'state_value': 0.0}  # the evaluation wants one; not reported here

  def reset(self, rng_key: jax.Array | None = None) -> None:
    self._processor.reset()
    self._action = self._num_frames = 0
    if rng_key is not None:
      self._rng = np.random.default_rng(np.asarray(rng_key))

  def step(self, timestep: dm_env.TimeStep) -> int:
    processed = self._processor(timestep)
    if processed is not None and not processed.last():
      stack = np.moveaxis(np.array(processed.observation), -1, 0)
      # Before an episode's first frame Tianshou repeats it, where ours are black.
      self._num_frames += 1
      blank = max(0, len(stack) - self._num_frames)
      stack[:blank] = stack[blank]
      request = {'act': base64.b64encode(stack.tobytes()).decode()}
      self._action = self._peer.ask(request)['action']
      if self._rng.random() < self._epsilon:
        self._action = int(self._rng.integers(self._num_actions))
    return self._action


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peer_python', required=True)
  parser.add_argument('--replay_dir', help='Pong logs; default: the demo logs')
  parser.add_argument('--updates', type=int, default=25_000)
  parser.add_argument('--chunk', type=int, default=500, help='updates in a turn')
  parser.add_argument('--eval_steps', type=int, default=60_000, help='agent steps, at least')
  args = parser.parse_args()

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  config = run_atari.Config(alpha=ALPHA)
  replay_dir = args.replay_dir or demo.find_or_make('pong')

  environment = atari_env.AtariEnv('pong', sticky_action_probability=0.25, seed=0)
  num_actions = environment.action_spec().num_values
  ours = agent.Cql(
    network=networks.quantile_network(num_actions, config.num_quantiles),
    optimizer=optax.adam(config.learning_rate, eps=config.adam_epsilon),
    data=replay.load(replay_dir, num_actions=num_actions),
    processor=processors.AtariProcessor(),
    batch_size=config.batch_size,
    target_network_update_period=config.target_network_update_period,
    alpha=config.alpha,
    double_q=config.double_q,
    eval_epsilon=config.eval_epsilon,
    rng_key=jax.random.PRNGKey(config.seed),
  )
  peer = protocol.Peer(
    args.peer_python, 'tianshou_cql.py', f'--replay_dir={replay_dir}', f'--alpha={ALPHA}'
  )

  seconds: dict[str, list[float]] = {'offline_zoo': [], 'tianshou': []}
  for done in range(0, args.updates, args.chunk):
    chunk = min(args.chunk, args.updates - done)
    seconds['offline_zoo'].append(learn.seconds(ours.learn, chunk))
    seconds['tianshou'].append(peer.ask({'train': chunk})['seconds'])
  versions = ', '.join(f'{name} {v}' for name, v in peer.ready['versions'].items())
  print(f'{versions}; {peer.ready["threads"]} threads')
  print(f'{args.updates} updates of {config.batch_size} in turns of {args.chunk}, alpha {ALPHA}\n')
  print('| learner | seconds | return | games |\n|---|---|---|---|', flush=True)
  players: dict[str, parts.Agent] = {
    'offline_zoo': ours,
    'tianshou': PeerAgent(peer, num_actions, config.eval_epsilon),
  }
  for name, player in players.items():
    play = functools.partial(playing.play_episodes, [player], [environment])
    result = evaluation.evaluate(play, args.eval_steps, config.seed, iteration=1)
    print(
      f'| {name} | {sum(seconds[name]):.0f} | {result["eval_episode_return"]:.1f} | '
      f'{result["eval_num_episodes"]} |',
      flush=True,
    )
  ratio = np.median(np.array(seconds['tianshou']) / np.array(seconds['offline_zoo']))
  print(f'\nA turn takes Tianshou {ratio:.2f} times as long (median).')


if __name__ == '__main__':
  main()
