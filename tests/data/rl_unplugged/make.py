"""Writes episodes as RL Unplugged's files have them, and records what TFDS makes of them.

This runs in an environment of its own, with TensorFlow 2.21.0 and TensorFlow Datasets 4.9.10:

  python tests/data/rl_unplugged/make.py

The play is the recorded Breakout of `../replay`, cut into short episodes; rewards are made up.
Written are, for two checkpoints, the gzip-compressed TFRecord files of the public bucket, by
TensorFlow; from these, by TFDS's own builder, the files that TFDS prepares; and `expected.npz`:
what TFDS gives when it reads these.
"""

import gzip
import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.rl_unplugged.rlu_atari_checkpoints_ordered import (
  rlu_atari_checkpoints_ordered,
)

HERE = pathlib.Path(__file__).parent
# Of each checkpoint's episodes: how many steps, and whether the last one is a terminal state.
CHECKPOINTS = (((9, True), (1, False), (14, False), (8, True), (1, True)), ((12, True), (6, False)))


def example(checkpoint: int, episode: int, observations, actions, rewards, ended: bool) -> bytes:
  discounts = np.ones(len(actions), np.float32)
  discounts[-1] = 1 - ended

  def floats(values):
    return tf.train.Feature(float_list=tf.train.FloatList(value=np.atleast_1d(values)))

  def ints(values):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=np.atleast_1d(values)))

  pngs = [tf.io.encode_png(frame[..., None]).numpy() for frame in observations]
  features = {
    'checkpoint_idx': ints(checkpoint),
    'episode_idx': ints(episode),
    'episode_return': floats(rewards.sum()),
    'clipped_episode_return': floats(np.clip(rewards, -1, 1).sum()),
    'observations': tf.train.Feature(bytes_list=tf.train.BytesList(value=pngs)),
    'actions': ints(actions),
    'unclipped_rewards': floats(rewards),
    'clipped_rewards': floats(np.clip(rewards, -1, 1)),
    'discounts': floats(discounts),
  }
  return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(
    deterministic=True
  )


def write_raw(directory: pathlib.Path) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  with gzip.open(HERE.parent / 'replay/Breakout/1/replay_logs/$store$_observation_ckpt.1.gz') as f:
    frames = np.load(f)
  start = 100
  for checkpoint, episodes in enumerate(CHECKPOINTS):
    path = directory / f'run_1-{checkpoint:05d}-of-{len(CHECKPOINTS):05d}'
    with tf.io.TFRecordWriter(str(path), 'GZIP') as writer:
      for episode, (length, ended) in enumerate(episodes):
        actions = rng.integers(4, size=length)
        rewards = rng.choice(np.array([0, 0, 1, 4, 7, -2.5], np.float32), length)
        if ended:
          actions[-1] = rewards[-1] = 0
        steps = frames[start : start + length]
        writer.write(example(checkpoint, episode, steps, actions, rewards, ended))
        start += length


def main() -> None:
  raw, prepared = HERE / 'raw', HERE / 'tfds'
  for directory in (raw, prepared):
    shutil.rmtree(directory, ignore_errors=True)
  write_raw(raw)
  builder_class = rlu_atari_checkpoints_ordered.RluAtariCheckpointsOrdered
  builder_class._SHARDS = builder_class._SPLITS = len(CHECKPOINTS)
  builder_class.get_file_prefix = lambda self: str(raw / 'run_1')
  with tempfile.TemporaryDirectory() as data_dir:
    builder = builder_class(config='Breakout_run_1', data_dir=data_dir)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=2)
    builder.download_and_prepare(download_config=config)
    prepared.mkdir()
    for path in pathlib.Path(builder.data_path).glob('*.tfrecord-*'):
      shutil.copy(path, prepared)
    read_config = tfds.ReadConfig(interleave_cycle_length=1)
    expected = {}
    for split in builder.info.splits:
      episodes = list(builder.as_dataset(split=split, read_config=read_config))
      for i, episode in enumerate(episodes):
        steps = list(episode['steps'].as_numpy_iterator())
        for name in steps[0]:
          expected[f'{split}/{i}/{name}'] = np.stack([step[name] for step in steps])
        for name in ('checkpoint_id', 'episode_id', 'episode_return'):
          expected[f'{split}/{i}/{name}'] = episode[name].numpy()
  np.savez_compressed(HERE / 'expected.npz', **expected)


if __name__ == '__main__':
  main()
