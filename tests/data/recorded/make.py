"""Records what batch_rl's own loader gives of shards that `logs.recorded` expands.

This runs in the environment of benchmarks/peers/dopamine_requirements.lock, with batch_rl's
batch_rl/fixed_replay/replay_memory/fixed_replay_buffer.py, commit 6f7f4d5, unchanged (its import of
dopamine.replay_memory is given dopamine.tf.replay_memory, as that has been called since):

  python -m offline_zoo.online.run_atari --environment_name=breakout --log_probabilities \
    --results_csv_path=/tmp/o/o.csv --warmup_steps=600 --epsilon_decay_steps=200 --eval_steps=1 \
    --num_updates_per_iteration=100 --num_iterations=1 --agent_flags='--batch_size=4'
  cp /tmp/o/recorded.play tests/data/recorded/breakout.play
  python -m offline_zoo.logs.recorded expand --path=tests/data/recorded/breakout.play \
    --replay_dir=/tmp/o/logs --shard_capacity=600
  python tests/data/recorded/make.py --loader=fixed_replay_buffer.py --replay_dir=/tmp/o/logs

`batch_rl.npz` has for each shard k and horizon n, 1 or 5, with k and n in its keys, of all valid
indices: `indices`, `action`, `reward`, `terminal`, and the CRC-32 of each `state` and `next_state`
([84, 84, 4], newest last).
"""

import argparse
import importlib.util
import pathlib
import sys
import zlib

import numpy as np
from dopamine.tf import replay_memory
from dopamine.tf.replay_memory import circular_replay_buffer

CAPACITY = 600
NUM_SHARDS = 2


def loader(path: str):
  """Imports batch_rl's file."""
  sys.modules['dopamine.replay_memory'] = replay_memory
  spec = importlib.util.spec_from_file_location('fixed_replay_buffer', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.FixedReplayBuffer


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--loader', required=True, help="batch_rl's fixed_replay_buffer.py")
  parser.add_argument('--replay_dir', required=True, help='shards of breakout.play')
  args = parser.parse_args()
  buffer_class, columns = loader(args.loader), {}
  for shard in range(NUM_SHARDS):
    for n_step in (1, 5):
      loaded = buffer_class(
        args.replay_dir, None, (84, 84), 4, CAPACITY, 32, n_step, 0.99,
        replay_file_start_index=shard, replay_file_end_index=shard + 1,
      )  # fmt: skip
      (buffer,) = loaded._replay_buffers
      # What a shard has of it is for the horizon that it was logged with.
      buffer.invalid_range = circular_replay_buffer.invalid_range(
        buffer.cursor(), CAPACITY, 4, n_step
      )
      valid = [i for i in range(CAPACITY) if buffer.is_valid_transition(i)]
      state, action, reward, next_state, _, _, terminal, indices = loaded.sample_transition_batch(
        len(valid), valid
      )
      crcs = [
        np.array([zlib.crc32(s.tobytes()) for s in states], np.uint32)
        for states in (state, next_state)
      ]
      named = {
        'indices': indices, 'action': action, 'reward': reward, 'terminal': terminal,
        'state': crcs[0], 'next_state': crcs[1],
      }  # fmt: skip
      columns |= {f'{name}_{shard}_{n_step}': column for name, column in named.items()}
      print(shard, n_step, len(valid), 'valid of', int(buffer.add_count))
  np.savez_compressed(pathlib.Path(__file__).with_name('batch_rl.npz'), **columns)


if __name__ == '__main__':
  main()
