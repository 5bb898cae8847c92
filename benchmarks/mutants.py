"""Spoils the code, one careless edit at a time, and reports what the tests do not notice.

  python -m benchmarks.mutants [--processes=2] [--only=dqn/agent.py] [--list]

Each edit names the test that must fail for it. It is applied to a copy of the checkout, where only
that is run. First all these tests are run on the code as it is, where they must pass.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import queue
import shutil
import signal
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Edit(NamedTuple):
  """A text that occurs once in a file of the package, another for it, and the test that must fail.

  The test is a pytest node below the package: a file, or a test in it.
  """

  file: str
  old: str
  new: str
  test: str


# For each file: (old text, new text, test).
EDITS: dict[str, list[tuple[str, str, str]]] = {
  'atari_data.py': [
    ("Game('breakout',            1.7,", "Game('breakout',            7.1,",
     'atari_data_test.py::test_published_scores'),
    ('return None if score is None else min(score, 1.0)', 'return score',
     'atari_data_test.py::test_capped_score_is_capped_above_only'),
    ('(g.human_score - g.random_score)', 'g.human_score', 'atari_data_test.py'),
  ],
  'atari_env.py': [
    ('frameskip=1', 'frameskip=4', 'atari_env_test.py'),
    ('repeat_action_probability=sticky_action_probability', 'repeat_action_probability=0.25',
     'atari_env_test.py::test_without_sticky_actions_the_seed_has_no_say'),
    ('repeat_action_probability=sticky_action_probability', 'repeat_action_probability=0.0',
     'atari_env_test.py::test_the_same_seed_and_actions_give_the_same_game'),
    ('full_action_space=False', 'full_action_space=True', 'atari_env_test.py'),
    ('self._seed = None\n', 'pass\n', 'atari_env_test.py::test_episodes_after_the_first_differ'),
    ("obs_type='grayscale'", "obs_type='ram'", 'atari_env_test.py'),
    ('self.ale.loadROM(self._path)', 'super().load_game()',
     'atari_env_test.py::test_a_rom_of_the_users_is_played'),
    ('if md5 not in known', 'if False', 'atari_env_test.py::test_roms_that_are_refused'),
    ('_md5(rom_path(environment_name, rom_dir))', '_md5(rom_path(environment_name))',
     'atari_env_test.py::test_a_rom_of_the_users_is_played'),
  ],
  'download.py': [
    ("{'Range': f'bytes={start}-'} if start else {}", '{}',
     'download_test.py::test_cut_connections_are_taken_up_where_they_ended'),
    ("'ab' if start else 'wb'", "'ab'", 'download_test.py::test_a_server_that_ignores_ranges'),
    ('and start:  # it is sent whole', 'and False:',
     'download_test.py::test_a_server_that_ignores_ranges'),
    ('if content.tell() < file.size:', 'if False:',
     'download_test.py::test_cut_connections_are_taken_up_where_they_ended'),
    ("== file.crc32c", "!= ''", 'download_test.py::test_a_wrong_checksum_is_given_a_second_chance'),
    (', ifGenerationMatch=file.generation', ', ifGenerationMatch=7',
     'download_test.py::test_a_file_that_changes'),
    ('      if partial.name not in wanted:', '      if False:',
     'download_test.py::test_a_file_that_changes'),
    ("query['pageToken'] = page['nextPageToken']", 'pass',
     'download_test.py::test_a_listing_in_pages'),
    ('num_failures, best = 0, progress()\n      num', 'pass\n      num',
     'download_test.py::test_what_brings_something_may_take_many_attempts'),
    ('if num_failures == MAX_ATTEMPTS', 'if num_failures > MAX_ATTEMPTS',
     'download_test.py::test_a_server_that_fails_for_good'),
    ('if total - here > free', 'if here > free',
     'download_test.py::test_a_disk_that_is_too_small'),
    ('        stop.set()\n', '        pass\n',
     'download_test.py::test_a_failure_ends_the_others_soon'),
    ('fcntl.LOCK_EX | fcntl.LOCK_NB', 'fcntl.LOCK_UN',
     'download_test.py::test_two_downloads_do_not_share_a_directory'),
    ('re.fullmatch(re.escape(prefix)', 're.search(re.escape(prefix)',
     'download_test.py::test_names_that_lead_elsewhere_are_not_ours'),
  ],
  'roms.py': [
    ("if _digest(staging / 'roms' / name, 'md5') != md5:", 'if False:',
     'roms_test.py::test_another_rom_is_refused'),
    ('if sha256 != SDIST_SHA256:', 'if False:', 'roms_test.py::test_another_archive_is_refused'),
    (' --hash=sha256:{SDIST_SHA256}', '',
     'roms_test.py::test_pip_does_not_run_another_package'),
    ('if any(rom_dir.iterdir()):', 'if False:', 'roms_test.py::test_nothing_is_overwritten'),
  ],
  'processors.py': [
    ('np.maximum(*self._screens)', 'np.minimum(*self._screens)', 'processors_test.py'),
    ('np.maximum(*self._screens)', 'self._screens[1]', 'processors_test.py'),
    ('cv2.INTER_AREA', 'cv2.INTER_LINEAR', 'processors_test.py'),
    ('np.concatenate([self._stack[1:], newest])', 'np.concatenate([newest, self._stack[1:]])',
     'processors_test.py'),
    ('self._reward += timestep.reward', 'self._reward = timestep.reward', 'processors_test.py'),
    ('self._discount *= timestep.discount', 'pass', 'processors_test.py'),
  ],
  'networks.py': [
    ('astype(jnp.float32) / 255.0', 'astype(jnp.float32)',
     'networks_test.py::test_white_is_one_and_black_is_zero'),
    ('x = relu(hk.Conv2D(64, kernel_shape=4', 'x = (hk.Conv2D(64, kernel_shape=4',
     'networks_test.py::test_the_quantile_network_written_out'),
    ('x = relu(hk.Conv2D(64, kernel_shape=3', 'x = (hk.Conv2D(64, kernel_shape=3',
     'networks_test.py::test_the_multi_head_network_written_out'),
    ("VarianceScaling(1.0, 'fan_avg', 'uniform')", "VarianceScaling(1.0, 'fan_in', 'uniform')",
     'networks_test.py::test_initialisation_is_glorot_uniform_with_zero_biases'),
    ("VarianceScaling(1.0 / 3.0**0.5, 'fan_in'", "VarianceScaling(1.0 / 3.0, 'fan_in'",
     'networks_test.py::test_the_other_networks'),
    ('return relu(hk.Linear(512', 'return (hk.Linear(512',
     'networks_test.py::test_the_quantile_network_written_out'),
    ('nature_torso(preprocess(frames), w_init, padding))',
     'nature_torso(frames.astype(jnp.float32), w_init, padding))',
     'networks_test.py::test_the_multi_head_network_written_out'),
    ('nature_torso(frames.astype(jnp.float32), w_init, padding)\n',
     'nature_torso(preprocess(frames), w_init, padding)\n',
     'networks_test.py::test_the_behaviour_network_written_out'),
    ("x = relu(hk.Linear(512, w_init=w_init, name=f'{name}_hidden')(features))",
     "x = hk.Linear(512, w_init=w_init, name=f'{name}_hidden')(features)",
     'networks_test.py::test_the_behaviour_network_written_out'),
    ('QuantileNetworkOutputs(q_values=jnp.mean(dist_q, axis=1)',
     'QuantileNetworkOutputs(q_values=jnp.max(dist_q, axis=1)',
     'networks_test.py::test_the_quantile_network_written_out'),
    ('q_values=jnp.mean(q_heads, axis=-1)', 'q_values=q_heads[..., 0]',
     'networks_test.py::test_the_multi_head_network_written_out'),
    ("Conv2D(64, kernel_shape=3, stride=1, padding=padding", "Conv2D(64, kernel_shape=3, stride=1, "
     "padding='SAME'", 'networks_test.py::test_averages_of_white_are_white_but_where'),
    ('_hidden(frames, w_init, padding)\n    return PolicyNetwork',
     "_hidden(frames, w_init, 'SAME')\n    return PolicyNetwork",
     'networks_test.py::test_averages_of_white_are_white_but_where'),
  ],
  'evaluation.py': [
    ('while num_steps < eval_steps', 'while num_steps <= eval_steps',
     'evaluation_test.py::test_the_episodes_that_count_are_the_first_ones'),
    ('in episodes:\n      return None', 'in episodes:\n      break',
     'evaluation_test.py::test_the_episodes_that_count_are_the_first_ones'),
    ('for n, x in episodes.items() if n < number)', 'for n, x in episodes.items())',
     'evaluation_test.py::test_what_is_missing_is_what_no_earlier_episode_has'),
    ('eval_steps // 2_000, 1), 4)', 'eval_steps // 1_000, 1), 4)',
     'evaluation_test.py::test_groups_are_small_where_few_episodes_count'),
    ('if worker.params_of != (seed, iteration) else None',
     'if worker.params_of is None else None',
     'evaluation_test.py::test_workers_have_no_say_in_what_is_evaluated'),
    ('if n not in episodes and n not in dealt)', 'if n not in episodes)',
     'evaluation_test.py::test_workers_play_different_episodes'),
    ('if worker.number is not None:\n          episodes', 'if True:\n          episodes',
     'evaluation_test.py::test_workers_that_all_die_are_given_up'),
    ('          worker.connection.send(None)\n', '          pass\n',
     'evaluation_test.py::test_an_evaluation_can_be_cancelled_and_leaves_its_workers_free'),
    ('if connection.poll():', 'if False:',
     'evaluation_test.py::test_workers_end_when_the_run_is_killed'),
    ('if worker.params_of != (seed, iteration) else None',
     'if (worker.params_of or (0, 0))[1] != iteration else None',
     'run_atari_test.py::test_several_seeds_go_on_where_they_were_stopped'),
    ('_steps, seed, progress.iteration, stop,',
     '_steps, self._config.seed, progress.iteration, stop,',
     'run_atari_test.py::test_several_seeds_are_each_as_alone'),
    ('seeds_state.online_params', 'parts.by_seed(self._config, state)[3].online_params',
     'run_atari_test.py::test_several_seeds_are_each_as_alone'),
    ('dataclasses.replace(progress)', 'progress',
     'run_atari_test.py::test_workers_change_nothing_but_the_time_it_takes'),
    ('      if self._progress.num_updates:\n', '      if False:\n',
     'run_atari_test.py::test_a_run_goes_on_where_an_evaluation_was_left'),
    ('        self._pending.result()\n        self', '        self',
     'run_atari_test.py::test_what_a_thread_cannot_save_ends_the_run'),
  ],
  'parts.py': [
    ('remembering_nothing(*example), batches)', 'jax.lax.stop_gradient(loss(*example)), batches)',
     'parts_test.py::test_losses_of_examples_and_their_gradients_are_as_vmaps'),
    ("scores = (config.environment_name, evaluation['eval_episode_return'])",
     "scores = (config.environment_name, evaluation['eval_episode_clipped_return'])",
     'parts_test.py::test_the_row_of_an_iteration'),
    ("'capped_normalized_return': atari_data.capped_human_normalized_score(*scores)",
     "'capped_normalized_return': atari_data.human_normalized_score(*scores)",
     'parts_test.py::test_normalised_returns_are_capped_in_one_column_and_empty_without_a_human'),
    ("'frame': FRAMES_PER_UPDATE * total_updates", "'frame': 4 * total_updates",
     'parts_test.py::test_the_row_of_an_iteration'),
    ('total_updates = self.iteration * self.num_updates', 'total_updates = self.num_updates',
     'parts_test.py::test_the_row_of_an_iteration'),
    ("'seconds': self.seconds + evaluation['eval_seconds']", "'seconds': self.seconds",
     'parts_test.py::test_the_row_of_an_iteration'),
    ("'seed': seed,", "'seed': config.seed,",
     'parts_test.py::test_each_seed_has_a_row_of_an_iteration'),
    ('by_seed(config, mean)[seed]', 'by_seed(config, mean)[config.seed]',
     'parts_test.py::test_each_seed_has_a_row_of_an_iteration'),
    ('np.asarray(mean) * num_updates', 'np.asarray(mean)',
     'parts_test.py::test_the_row_of_an_iteration'),
    ('np.mean(values, axis=0)', 'np.mean(values)',
     'parts_test.py::test_learn_loop_donates_and_averages'),
    ('self.num_updates, self.metric_sums, self.seconds = 0, {}, 0.0', 'self.num_updates = 0',
     'parts_test.py::test_the_row_of_an_iteration'),
    ('MAX_FRAMES_PER_EPISODE = 108_000', 'MAX_FRAMES_PER_EPISODE = 27_000',
     'playing_test.py::test_an_episode_ends_after_half_an_hour_of_play'),
    ('if frame == MAX_FRAMES_PER_EPISODE', 'if frame > MAX_FRAMES_PER_EPISODE',
     'parts_test.py::test_run_loop_ends_an_episode_at_the_frame_limit'),
    ('if not np.isfinite(mean).all()', 'if np.isnan(mean).all()',
     'parts_test.py::test_a_loss_that_is_not_finite_stops_the_run'),
    ('if not np.isfinite(mean).all()', 'if not np.isfinite(mean).any()',
     'parts_test.py::test_one_seeds_loss_that_is_not_finite_stops_all'),
    ('jax.jit(update, donate_argnums=0,', 'jax.jit(update,',
     'parts_test.py::test_learn_loop_donates_and_averages'),
    ('history.append(jax.device_get(metrics))', 'history[:] = [jax.device_get(metrics)]',
     'parts_test.py::test_learn_loop_donates_and_averages'),
    ('chunk = min(max_updates', 'chunk = max(max_updates',
     'parts_test.py::test_learn_iteration_averages_over_all_its_updates'),
  ],
  'playing.py': [
    ('min(max(self._step_reward, -1.0), 1.0)', 'min(self._step_reward, 1.0)',
     'playing_test.py::test_clipping_is_of_agent_steps_not_frames'),
    ('return -(-self.num_frames //', 'return (self.num_frames //',
     'playing_test.py::test_an_episode_by_hand'),
    ('for name, value in agent.statistics.items():', 'for name, value in ():',
     'playing_test.py::test_an_episode_by_hand'),
    ('np.random.SeedSequence((seed, iteration, number))',
     'np.random.SeedSequence((seed, iteration, 0))',
     'playing_test.py::test_an_episode_begins_with_its_own_seed_and_key'),
    ('np.random.SeedSequence((seed, iteration, number))',
     'np.random.SeedSequence((seed, 0, number))',
     'playing_test.py::test_an_episode_begins_with_its_own_seed_and_key'),
    ('  agent.reset(act_key)\n', '  agent.reset()\n',
     'playing_test.py::test_an_episode_begins_with_its_own_seed_and_key'),
    ('if num_before >= num_steps', 'if num_before > num_steps',
     'playing_test.py::test_an_episode_is_given_up_when_it_cannot_count'),
    ('loops.pop(number, None)', 'pass',
     'playing_test.py::test_an_episode_is_given_up_when_it_cannot_count'),
    (' and seen[0][0] == first', '',
     'playing_test.py::test_the_first_episode_is_recorded_in_its_colours'),
    ('copy.deepcopy(processor)', 'processor',
     'agents_test.py::test_several_play_together_as_each_alone'),
    ('    return self.action\n', '    return int(self.action)\n',
     'agents_test.py::test_several_play_together_as_each_alone'),
    ('      decide()\n', '', 'agents_test.py::test_several_play_together_as_each_alone'),
    ('online_params = _transpose(transposed_params)', 'online_params = transposed_params',
     'agents_test.py::test_several_play_together_as_each_alone'),
    ('player.act_key, player.action[()] = keys[index]', '_, player.action[()] = keys[index]',
     'agents_test.py::test_several_play_together_as_each_alone'),
  ],
  'program.py': [
    ("    jax.config.update('jax_enable_compilation_cache', False)\n    return\n  name",
     '    return\n  name',
     'program_test.py::test_what_jax_compiles_is_kept_in_the_users_cache_or_where_a_flag_says'),
    ('flag or getattr(jax.config, name)', 'flag',
     'program_test.py::test_what_jax_compiles_is_kept_in_the_users_cache_or_where_a_flag_says'),
    ("    if flag:\n      raise OSError(f'--comp", "    if False:\n      raise OSError(f'--comp",
     'program_test.py::test_nowhere_to_keep_what_jax_compiles_is_said_once'),
    ("jax.config.update('jax_default_matmul_precision', 'float32')", 'pass',
     'program_test.py::test_floats_are_multiplied_in_full_and_ranks_are_not_promoted'),
    ("jax.config.update('jax_numpy_rank_promotion', 'raise')", 'pass',
     'program_test.py::test_floats_are_multiplied_in_full_and_ranks_are_not_promoted'),
    ('int(m[2] or m[1]) + 1)', 'int(m[2] or m[1]))',
     'program_test.py::test_lists_of_integers_and_ranges'),
    ('[0-9]{1,6})(', '[0-9]+)(', 'program_test.py::test_lists_of_integers_and_ranges'),
    ('value is None or value > 0', 'value is None or value >= 0',
     'agents_test.py::test_bad_values_are_named'),
    ('0 <= getattr(config, name) <= 1', 'getattr(config, name) <= 1',
     'agents_test.py::test_bad_values_are_named'),
    ('config.seed + config.num_seeds <= 2**32', 'True',
     'run_atari_test.py::test_bad_flags_are_named_before_anything_is_written'),
    ('0 <= config.seed < 2**32', 'config.seed < 2**32',
     'agents_test.py::test_bad_values_are_named'),
  ],
  'replay.py': [
    ('jnp.clip(rewards, -data.max_abs_reward, data.max_abs_reward)',
     'jnp.clip(rewards, -1.0, 1.0)',
     'replay_test.py::test_rewards_are_held_raw_and_small_and_clipped_when_sampled'),
    ('jnp.where(ended, 0.0, jnp.float32(data.discount**data.n_step))',
     'jnp.where(ended, 0.0, jnp.float32(data.discount))',
     'replay_test.py::test_rewards_end_with_the_episode'),
    ('data.discount ** np.arange(data.n_step)', 'data.discount ** np.arange(1, data.n_step + 1)',
     'replay_test.py::test_rewards_end_with_the_episode'),
    ('belong = jnp.cumsum(terminal, axis=1) - terminal == 0', 'belong = terminal >= 0',
     'replay_test.py::test_rewards_end_with_the_episode'),
    ('(batch_size,), 0, data.run_ends[-1])', '(batch_size,), 0, data.run_ends[0])',
     'replay_test.py::test_sampling_is_uniform_over_valid_rows_and_touches_no_other'),
    ('(batch_size,), 0, data.run_ends[-1])', '(batch_size,), 1, data.run_ends[-1])',
     'replay_test.py::test_sampling_is_uniform_over_valid_rows_and_touches_no_other'),
    ('np.random.default_rng((self._seed, iteration))', 'np.random.default_rng(iteration)',
     'replay_test.py::test_resident_shards_are_a_function_of_seed_and_iteration'),
    ('np.random.default_rng((self._seed, iteration))', 'np.random.default_rng(self._seed)',
     'replay_test.py::test_a_budget_makes_sets_of_shards_that_change_every_iteration'),
    ('max_abs_reward=self._max_abs_reward,', 'max_abs_reward=1.0,',
     'replay_test.py::test_rewards_are_held_raw_and_small_and_clipped_when_sampled'),
  ],
  'episodes.py': [
    ('int(fraction * is_there.sum())', 'round(fraction * is_there.sum())',
     'episodes_test.py::test_the_first_of_each_shard_are_as_many_as_dopamines_lab_takes'),
    ('kept &= np.concatenate(firsts)', 'pass',
     'episodes_test.py::test_each_condition_looks_at_what_those_before_it_kept'),
    ('drawn[: max(num_drawn, 1)]', 'drawn[:num_drawn]',
     'episodes_test.py::test_one_episode_is_drawn_even_if_it_is_longer'),
    ('default_rng(seed).permutation(candidates)', 'default_rng(0).permutation(candidates)',
     'episodes_test.py::test_a_seed_draws_the_same_again'),
    ('np.random.default_rng(seed).permutation(candidates)', 'candidates',
     'episodes_test.py::test_random_episodes_are_whole_and_alike_in_all_shards'),
    ("_whole(kept, returns, 'max_random_transitions')", 'np.flatnonzero(kept)',
     'episodes_test.py::test_random_episodes_are_whole_and_alike_in_all_shards'),
    ('kept &= returns >= least', 'kept = returns >= least',
     'episodes_test.py::test_each_condition_looks_at_what_those_before_it_kept'),
    (' - starts - (STACK_SIZE - 1)', ' - starts', 'episodes_test.py::test_episodes_of_a_shard'),
  ],
  'encoding/shards.py': [
    ('if not log_shard.has_probabilities():', 'if False:',
     'replay_test.py::test_logs_without_probabilities'),
    ('isal_zlib.crc32(used.data, checksum)', 'isal_zlib.crc32(used.data[:0], checksum)',
     'replay_test.py::test_the_checksum_is_of_every_column'),
    ('(actions, rows.reward, rows.terminal, rows.probability)',
     '(rows.reward, rows.terminal, rows.probability)',
     'replay_test.py::test_the_checksum_is_of_every_column'),
    ('(actions, rows.reward, rows.terminal, rows.probability)',
     '(actions, rows.terminal, rows.probability)',
     'replay_test.py::test_the_checksum_is_of_every_column'),
    ('(actions, rows.reward, rows.terminal, rows.probability)',
     '(actions, rows.reward, rows.probability)',
     'replay_test.py::test_the_checksum_is_of_every_column'),
    ('is_whole[:1] &= begins_here', 'pass',
     'replay_test.py::test_mean_episode_return_is_of_whole_episodes_only'),
    ('for dtype in (np.int8, np.int16):', 'for dtype in (np.int8,):',
     'replay_test.py::test_rewards_are_held_raw_and_small_and_clipped_when_sampled'),
  ],
  'encoding/frame_store.py': [
    ('words, (-5, -3, -1), (-5, -4, -3)', 'words, (-5, -3, -1), (-5, -3, -4)',
     'encoding/frame_store_test.py::test_every_frame_comes_back'),
    ('((num_items - 1).bit_length() + 7)', '(num_items.bit_length() + 7)',
     'encoding/frame_store_test.py::test_pack_takes_as_many_bytes_as_the_largest_id_needs'),
  ],
  'logs/inspect.py': [
    (' & (encoded.terminals != log_shard.CUT)', '',
     'logs/inspect_test.py::test_a_frame_without_an_action_is_no_step'),
    ('(lengths > 0) & (starts > 0)', '(lengths > 0)',
     'logs/inspect_test.py::test_all_is_said_in_text'),
    ('is_padded[is_padded] = is_padding[rows]', 'pass',
     'logs/inspect_test.py::test_what_is_suspicious'),
    ('60 // NUM_ACTION_REPEATS', '60',
     'logs/inspect_test.py::test_the_video_is_the_best_whole_episode'),
    ('first = start + STACK_SIZE - 1', 'first = start',
     'logs/inspect_test.py::test_the_video_is_the_best_whole_episode'),
    ('len(np.unique(every))', 'len(every)', 'logs/inspect_test.py::test_all_is_said_in_text'),
    ('np.flatnonzero(summaries[position].is_step)', 'np.arange(summaries[position].num_rows)',
     'logs/inspect_test.py::test_the_picture_shows_steps_of_all_shards'),
  ],
  'logs/demo.py': [
    ('rng.uniform(0.0, max_epsilon)', '0.0',
     'logs/demo_test.py::test_rates_of_random_actions_spread_over_the_episodes'),
    ('rng.uniform(0.0, max_epsilon)', 'rng.uniform(0.0, 1.0)',
     'logs/demo_test.py::test_rates_of_random_actions_spread_over_the_episodes'),
    ('play.game(config.environment_name, config.sticky_action_probability, rom_dir)',
     'play.game(config.environment_name, 0.25, rom_dir)',
     'logs/demo_test.py::test_the_emulators_chance_is_as_the_flag_says_and_its_rom_the_agents'),
    ('play.game(config.environment_name, config.sticky_action_probability, rom_dir)',
     'play.game(config.environment_name, config.sticky_action_probability, None)',
     'logs/demo_test.py::test_the_emulators_chance_is_as_the_flag_says_and_its_rom_the_agents'),
    ("'policy_checkpoint', not samples,", "'policy_checkpoint', True,",
     'logs/demo_test.py::test_what_was_not_logged_as_it_says_is_not_played'),
    ('if rng.random() < epsilon', 'if rng.random() > epsilon',
     'logs/demo_test.py::test_random_actions_are_as_often_as_they_should_be'),
    ('rng.integers(game.num_actions)', 'rng.integers(1, game.num_actions)',
     'logs/demo_test.py::test_random_actions_are_as_often_as_they_should_be'),
    ('terminals[-1] = 1', 'terminals[-1] = 0',
     'logs/demo_test.py::test_an_episode_cut_at_the_limit_is_logged_as_ended'),
    ('eval_epsilon=0.0, flag', 'eval_epsilon=1.0, flag',
     'logs/demo_test.py::test_a_trained_agents_play_is_what_it_does_frame_by_frame'),
    ('config.epsilon or 0.0', '0.0', 'logs/demo_test.py::test_a_trained_agents_logs'),
  ],
  'logs/play.py': [
    ('np.maximum(*self.screens)', 'self.screens[1]',
     'logs/play_test.py::test_play_is_the_run_loops'),
    ('if repeat >= -2', 'if repeat >= -1', 'logs/play_test.py::test_play_is_the_run_loops'),
    ('[*self._stack[1:], self.frame]', '[self.frame, *self._stack[:-1]]',
     'logs/play_test.py::test_play_is_the_run_loops'),
    ('reward += ', 'reward = ', 'logs/play_test.py::test_play_is_the_run_loops'),
    ('if not stick', 'if stick', 'logs/play_test.py::test_play_is_the_run_loops'),
    ('self._num_steps == MAX', 'self._num_steps > MAX',
     'logs/play_test.py::test_episodes_end_at_the_limit'),
  ],
  'logs/recorded.py': [
    ('checksums.values[-1] != expected or ', '',
     'logs/recorded_test.py::test_one_changed_action_is_found_at_the_first_checksum'),
    ("struct.pack('<BfB', action,", "struct.pack('<BfB', 0,",
     'logs/recorded_test.py::test_one_changed_action_is_found_at_the_first_checksum'),
    ('terminals[i] != (last and episode.ended)', 'False',
     'logs/recorded_test.py::test_another_seed_or_end_is_found'),
    ('decompress(xz, _MAX_BLOCK_BYTES)', 'decompress(xz)',
     'logs/recorded_test.py::test_damage_is_named'),
    ('and ended[:-1].all()', '', 'logs/recorded_test.py::test_damage_is_named'),
    ('google_crc32c.value(xz) == checksum', 'True', 'logs/recorded_test.py::test_damage_is_named'),
    ('md5 == header.rom_md5', 'True',
     'logs/recorded_test.py::test_another_rom_and_another_version'),
    ('emulator != header.emulator', 'False',
     'logs/recorded_test.py::test_another_rom_and_another_version'),
    ('e.actions * 3 + e.choices', 'e.actions * 3',
     'logs/recorded_test.py::test_a_recording_expands_to_what_would_have_been_logged'),
  ],
  'online/growing_replay.py': [
    ('if place < self._num_repeated', 'if place < self._num_repeated - 1',
     'online/growing_replay_test.py::test_all_transitions_are_those_of_a_slow_loop'),
    ("self._num_rows - self._settings['n_step']", 'self._num_rows',
     'online/growing_replay_test.py::test_all_transitions_are_those_of_a_slow_loop'),
    ('self._oldest_row + NUM_PADDING_ROWS)', 'self._oldest_row)',
     'online/growing_replay_test.py::test_all_transitions_are_those_of_a_slow_loop'),
    ('if len(self._firsts) > self._max_episodes', 'if False',
     'online/growing_replay_test.py::test_no_more_episodes_than_there_is_room_for'),
  ],
  'online/learner.py': [
    (' or checksum != self._play_checksum', '',
     'online/run_atari_test.py::test_a_recording_that_is_not_the_runs'),
    ('PER_EPISODE) < epsilon', 'PER_EPISODE) > epsilon',
     'online/run_atari_test.py::test_actions_are_the_schedules'),
    ('lasts[step + 1 : end]', 'lasts[step + 1 : end + 1]',
     'online/run_atari_test.py::test_random_actions_last_as_in_epsilon_z_greedy'),
    ('if self._lasts[step]:', 'if False:',
     'online/run_atari_test.py::test_other_values_arrive_and_a_run_of_them_goes_on'),
    ('if self._begins[step] and not has_choices:', 'if not has_choices:',
     'online/run_atari_test.py::test_other_values_arrive_and_a_run_of_them_goes_on'),
    ('num_steps - self.warmup_steps', 'num_steps',
     'online/run_atari_test.py::test_epsilon_falls_as_dopamines'),
    ('self.num_steps -= len(steps)', 'pass',
     'online/run_atari_test.py::test_a_run_goes_on_where_it_was_stopped'),
    ('returns=self._returns.copy()', 'returns=np.zeros(2)',
     'online/run_atari_test.py::test_a_run_goes_on_where_it_was_stopped'),
    ('self._episode(ended=False) if self._actions else None', 'None',
     'online/run_atari_test.py::test_the_recording_is_what_was_played'),
  ],
  'online/run_atari.py': [
    ("    results.write_atomically(recording, agent.recording(), f'.{RECORDING}.partial')\n"
     '    run.save(agent.get_state(), progress)',
     "    run.save(agent.get_state(), progress)\n"
     "    results.write_atomically(recording, agent.recording(), f'.{RECORDING}.partial')",
     'online/run_atari_test.py::test_a_kill'),
    ('dataclasses.replace(config, eval_epsilon=0.0)', 'config',
     'online/run_atari_test.py::test_the_greedy_action_is_greedy'),
    ('n_step=agents.n_step', 'n_step=1',
     'online/run_atari_test.py::test_other_values_arrive_and_a_run_of_them_goes_on'),
    ('max_abs_reward=agents.max_abs_reward', 'max_abs_reward=None',
     'online/run_atari_test.py::test_other_values_arrive_and_a_run_of_them_goes_on'),
    ('      config.zeta_exponent,\n', '      None,\n',
     'online/run_atari_test.py::test_other_values_arrive_and_a_run_of_them_goes_on'),
    ('      config.steps_per_update,\n', '      4,\n',
     'online/run_atari_test.py::test_other_values_arrive_and_a_run_of_them_goes_on'),
  ],
  'logs/demo_policies.py': [
    ('y += 1 if downward > 0 else -1', 'pass',
     'logs/demo_policies_test.py::test_pongs_ball_bounces_off_both_walls'),
    ('min(x, 2 * width - x)', 'x',
     'logs/demo_policies_test.py::test_breakouts_ball_is_reflected_between_the_walls'),
  ],
  'studies/child.py': [
    ('  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)\n', '',
     'studies/sweep_test.py::test_what_a_killed_sweep_ran_saves_and_ends'),
    ("  os.sched_setaffinity(0, map(int, cores.split(',')))\n", '',
     'studies/sweep_test.py::test_cores_and_niceness'),
    ('os.nice(int(niceness))', 'os.nice(0)', 'studies/sweep_test.py::test_cores_and_niceness'),
    ('file.write(str(total))', 'file.write(niceness)',
     'studies/sweep_test.py::test_niceness_counts_among_sessions_too'),
    ('if os.getppid() != int(parent):', 'if False:',
     'studies/sweep_test.py::test_a_child_whose_parent_has_ended'),
  ],
  'studies/plan.py': [
    ('progress.iterations * config.num_updates_per_iteration', 'run.num_updates',
     'studies/sweep_test.py::test_logs_are_made_once_and_what_was_learnt_is_evaluated_once'),
    ('      seeds.add((run.data, run.agent, seed))\n', '',
     'studies/sweep_test.py::test_all_is_checked_before_anything_starts'),
    ('        places.add(place)\n', '',
     'studies/sweep_test.py::test_all_is_checked_before_anything_starts'),
    ('makers.setdefault(config.replay_dir, run.make) != run.make', 'False',
     'studies/sweep_test.py::test_all_is_checked_before_anything_starts'),
    ('Progress(len(rows) // num_seeds, seconds)', 'Progress(len(rows), seconds)',
     'studies/sweep_test.py::test_time_is_of_what_goes_on_at_a_time'),
    ('if progress.iterations < config.num_iterations:', 'if True:',
     'studies/sweep_test.py::test_what_is_finished_never_runs_again'),
    ('    and all(tuple(row[:4]) == expected for row in rows)\n', '',
     'studies/sweep_test.py::test_logs_are_made_once_and_what_was_learnt_is_evaluated_once'),
    ('None if pathlib.Path(self.config.replay_dir).exists() else self.make', 'self.make',
     'studies/sweep_test.py::test_logs_are_made_once_and_what_was_learnt_is_evaluated_once'),
    ('  except BlockingIOError:\n    file.close()\n    return None\n',
     '  except BlockingIOError:\n    pass\n',
     'studies/sweep_test.py::test_two_sweeps_share_a_directory'),
    ("max(learning, evaluating) if beside", 'learning + evaluating if beside',
     'studies/sweep_test.py::test_time_is_of_what_goes_on_at_a_time'),
    ("in given:", "in ():",
     'studies/sweep_test.py::test_all_is_checked_before_anything_starts'),
  ],
  'studies/sweep.py': [
    ('      if step.words == run.words:', '      if False:',
     'studies/sweep_test.py::test_logs_are_made_once_and_what_was_learnt_is_evaluated_once'),
    ('        except OSError as error:  # where', '        except KeyError as error:  # where',
     'studies/sweep_test.py::test_a_place_that_cannot_be_is_a_failure_of_its_runs_alone'),
    ('num_failures[run] <= num_retries', 'num_failures[run] < num_retries',
     'studies/sweep_test.py::test_who_fails_is_tried_again_and_does_not_stop_the_others'),
    ('(errors or lines or', '(lines[:1] or',
     'studies/sweep_test.py::test_who_fails_is_tried_again_and_does_not_stop_the_others'),
    ('        attempt.process.terminate()', '        attempt.process.kill()',
     'studies/sweep_test.py::test_sigterm_is_passed_on_once'),
    ('heapq.heapreplace(ends, ends[0] + ', 'heapq.heapreplace(ends, ',
     'studies/sweep_test.py::test_the_estimated_end_by_hand'),
    ('run.agent if updates[run.agent] else None\n', 'None\n',
     'studies/sweep_test.py::test_the_estimated_end_by_hand'),
    ("if plan.next_step(run) is not None]\n  if not left", "]\n  if not left",
     'studies/sweep_test.py::test_a_slurm_task_is_one_run'),
    ('runs = [runs[config.index]]', 'pass', 'studies/sweep_test.py::test_a_slurm_task_is_one_run'),
  ],
  'seeds.py': [
    ('[agent.initial_state(jax.random.PRNGKey(seed)) for seed in seeds]',
     '[agent.initial_state(jax.random.PRNGKey(3)) for seed in seeds]',
     'run_atari_test.py::test_several_seeds_are_each_as_alone'),
    ('[state for state, _ in learnt]', '[learnt[0][0] for _ in learnt]',
     'seeds_test.py::test_fifty_updates_together_are_those_in_turn[dqn]'),
    ('if on_cpu else learn_together', 'if not on_cpu else learn_together',
     'seeds_test.py::test_fifty_updates_together_are_those_in_turn[dqn]'),
    ('leaf[i]', 'leaf[-i]',
     'seeds_test.py::test_fifty_updates_together_are_those_in_turn[dqn]'),
    ('jax.tree.map(np.array, self._states)', 'self._states',
     'seeds_test.py::test_a_state_is_gone_on_from'),
    ('self._states = jax.tree.map(jnp.array, state)', 'pass',
     'seeds_test.py::test_a_state_is_gone_on_from'),
  ],
  'trained_agent.py': [
    ("f'[{seeds.index(seed)}]'", "'[0]'",
     'run_atari_test.py::test_several_seeds_are_each_as_alone'),
  ],
  'studies/runs.py': [
    ('data = name if name in data_names else None', 'data = None',
     'studies/runs_test.py::test_a_sweeps_runs_are_told_apart_by_their_data'),
    ("int(row['num_updates']) == run.num_updates[-1]", 'True',
     'studies/runs_test.py::test_the_last_evaluation_is_of_the_episodes_where_all_runs_have_them'),
    ("{'data': run.data, **row} if named else row", 'row',
     'studies/runs_test.py::test_an_archive_of_a_study_reads_back'),
  ],
  'studies/report.py': [
    ('if last.returns.min() > runs.logged_mean', 'if last.returns.max() > runs.logged_mean',
     'studies/report_test.py::test_last_evaluations_of_a_study_by_hand'),
  ],
  'studies/plots.py': [
    ('_draw_references(axes.axvline, of_data, limits)', 'pass',
     'studies/plots_test.py::test_last_evaluations'),
  ],
  'studies/evaluate.py': [
    ('enumerate(returns.tolist(), start=1)', 'enumerate(returns.tolist())',
     'studies/evaluate_test.py::test_the_program'),
  ],
  'results.py': [
    ("stored['agent'] != agent_name or moved or _differing(theirs, ours)", 'False',
     'studies/sweep_test.py::test_what_is_finished_never_runs_again'),
    ("'results_csv_path', 'tensorboard_dir', 'video_dir',\n)",
     "'results_csv_path', 'tensorboard_dir', 'video_dir', 'seed',\n)",
     'run_atari_test.py::test_a_checkpoint_of_another_run'),
    ("'results_csv_path', 'tensorboard_dir', 'video_dir',\n)",
     "'results_csv_path', 'tensorboard_dir', 'video_dir', 'discount',\n)",
     'run_atari_test.py::test_a_checkpoint_of_another_run'),
    ('and not np.isfinite(array).all()', 'and np.isnan(array).any()',
     'run_atari_test.py::test_one_infinite_parameter_is_not_saved'),
    ('agent.set_state(state)', 'pass',
     'run_atari_test.py::test_a_run_goes_on_where_it_was_stopped[dqn]'),
    ('len(progress.rows) // config.num_seeds + 1', 'len(progress.rows) + 1',
     'results_test.py::test_rows_of_several_seeds'),
    ('float(np.mean(of_seeds))', 'float(of_seeds[0])',
     'results_test.py::test_rows_of_several_seeds'),
    ("[row for row in rows if row['seed'] == seed]", 'rows',
     'results_test.py::test_rows_of_several_seeds'),
    ('    and len(progress.rows) % config.num_seeds == 0\n', '',
     'results_test.py::test_records_that_no_run_of_several_seeds_has'),
    ("if theirs != checksum:", 'if False:',
     'run_atari_test.py::test_a_checkpoint_of_other_logs'),
  ],
}  # fmt: skip

_STATE = 'LearnerState(rng_key, online_params, target_params, opt_state, num_updates), metrics'
_WHERE = 'jnp.where(is_random, random_action, jnp.argmax(q_t))'
_TARGET = 'test_the_target_is_copied_every_period_and_at_no_other_time'
_BATCHES = 'test_batches_are_new_in_every_update'
_METRICS = 'test_metrics_are_what_they_say'
_ACTIONS = 'test_actions_are_the_best_ones_but_for_random_ones'
_REPEATS = 'test_an_action_is_repeated_until_the_next_decision'
_LEARN = 'test_learn_is_so_many_updates_and_compiles_once'
# What is the same text in every agent, spoilt in one agent.py: (agent, old text, new text, test).
SHARED_IN_AGENT = [
  ('qrdqn', 'num_updates, target_network_update_period\n', 'num_updates, 1\n', _TARGET),
  ('dqn', 'online_params, state.target_params, num_updates, ',
   'online_params, state.target_params, state.num_updates, ', _TARGET),
  ('bcq', 'online_params, state.target_params, num_updates, ',
   'state.online_params, state.target_params, num_updates, ', _TARGET),
  ('rem', 'num_updates = state.num_updates + 1', 'num_updates = state.num_updates + 2', _TARGET),
  ('rem', _STATE, _STATE.replace('opt_state', 'state.opt_state'),
   'test_the_optimizers_state_is_carried'),
  ('cql', _STATE, _STATE.replace('rng_key', 'state.rng_key'), _BATCHES),
  ('bcq', 'replay.sample(data, sample_key, batch_size)',
   'replay.sample(data, jax.random.PRNGKey(0), batch_size)', _BATCHES),
  ('qrdqn', 'replay.sample(data, sample_key, batch_size)', 'replay.sample(data, sample_key, 32)',
   _BATCHES),
  ('cql', "'q_max': jnp.mean(jnp.max(q_tm1, axis=-1))", "'q_max': jnp.max(q_tm1)", _METRICS),
  ('rem', 'jnp.mean(rlax.batched_index(q_tm1, batch.a_tm1))', 'jnp.mean(q_tm1)', _METRICS),
  ('bcq', "'loss': mean,", "'loss': mean * batch_size,", _METRICS),
  ('cql', "'conservative_loss': jnp.mean(", "'conservative_loss': jnp.sum(", _METRICS),
  ('qrdqn', 'jnp.argmax(q_t)', 'jnp.argmin(q_t)', _ACTIONS),
  ('rem', 'random_action, jnp.argmax(q_t))', 'random_action, 0)', _ACTIONS),
  ('cql', _WHERE, 'jnp.argmax(q_t)', _ACTIONS),
  ('bcq', '(epsilon_key) < eval_epsilon', '(epsilon_key) > eval_epsilon', _ACTIONS),
  ('dqn', '(epsilon_key) < eval_epsilon', '(epsilon_key) < eval_epsilon / 2', _ACTIONS),
  ('qrdqn', '(), 0, len(q_t))', '(), 1, len(q_t))', _ACTIONS),
  ('cql', '(), 0, len(q_t))', '(), 0, len(q_t) - 1)', _ACTIONS),
  ('rem', 'rng_key, epsilon_key, action_key = jax', '_, epsilon_key, action_key = jax', _ACTIONS),
  ('bcq', 'self._action, self._value = int(action), float(value)',
   'self._action, self._value = 0, float(value)', _REPEATS),
  ('qrdqn', 'if processed is not None and not', 'if processed is None or not', _REPEATS),
  ('cql', 'jnp.argmax(q_t)), jnp.max(q_t)', 'jnp.argmax(q_t)), jnp.mean(q_t)', _REPEATS),
  ('rem', 'self.processor.reset()\n', 'pass\n',
   'test_acting_and_states_are_the_same_text_in_every_agent'),
  ('cql', 'self._act_key = rng_key', 'pass', 'test_acting_is_a_function_of_the_key'),
  ('bcq', 'jax.tree.map(np.array, self._state)', 'self._state', _LEARN),
  ('qrdqn', 'self._learn = parts.learn_loop(update)',
   'self._learn = lambda *args: parts.learn_loop(lambda *x: update(*x))(*args)', _LEARN),
  ('dqn', 'self._state, metrics = self._learn', '_, metrics = self._learn', _LEARN),
  ('c51', 'num_updates, target_network_update_period\n', 'num_updates, 2\n', _TARGET),
  ('crr', _STATE, _STATE.replace('rng_key', 'state.rng_key'), _BATCHES),
  ('multi_network_rem', _STATE, _STATE.replace('opt_state', 'state.opt_state'),
   'test_the_optimizers_state_is_carried'),
  ('bc', 'LearnerState(rng_key, online', 'LearnerState(state.rng_key, online', _BATCHES),
  ('off_policy_dqn', "'loss': mean,", "'loss': -mean,", _METRICS),
  ('rem', 'rng_key, init_key = jax.random.split(rng_key)', 'init_key = jax.random.PRNGKey(0)',
   'test_update_and_initial_state_are_functions_of_their_arguments'),
]  # fmt: skip

_FLAGS = 'test_every_flag_arrives_under_its_name'
_MAIN = 'test_main_passes_on_what_it_makes'
_STEPS = 'test_the_optimizers_first_two_steps_by_hand'
_DEFAULTS = 'test_defaults_are_the_published_values'
# Likewise in one run_atari.py.
SHARED_IN_RUN_ATARI = [
  ('dqn', 'config.learning_rate,', '0.00025,', _FLAGS),
  ('dqn', 'decay=config.rmsprop_decay', 'decay=0.95', _FLAGS),
  ('dqn', 'eps=config.rmsprop_epsilon', 'eps=1e-5', _FLAGS),
  ('dqn', 'initial_scale=1.0', 'initial_scale=0.0', _STEPS),
  ('dqn', 'centered=True', 'centered=False', _STEPS),
  ('rem', 'eps=config.adam_epsilon', 'eps=1e-8', _FLAGS),
  ('cql', 'optax.adam(config.learning_rate', 'optax.adam(5e-5', _FLAGS),
  ('bcq', 'optax.adam(', 'optax.adamax(', _STEPS),
  ('qrdqn', 'jax.random.PRNGKey(config.seed)', 'jax.random.PRNGKey(1)', _FLAGS),
  ('cql', '    seed=config.seed,\n', '', _FLAGS),
  ('bcq', '(make_agent, config, num_actions, None)', '(make_agent, config, num_actions, data)',
   _MAIN),
  ('dqn', '    n_step=config.n_step,\n', '', _FLAGS),
  ('qrdqn', '    discount=config.discount,\n', '', _FLAGS),
  ('rem', '    max_abs_reward=config.max_abs_reward,\n', '', _FLAGS),
  ('cql', '    max_rows_per_shard=config.max_rows_per_shard,\n', '', _FLAGS),
  ('bcq', '    memory_gb=config.replay_memory_gb,\n', '', _FLAGS),
  ('dqn', '    num_actions=num_actions,\n', '', _MAIN),
  ('qrdqn', '    num_resident_shards=run.progress.num_resident_shards,\n', '', _MAIN),
  ('rem', 'replay.cache_dir(config.replay_cache_dir)', 'replay.cache_dir(None)', _FLAGS),
  ('cql', '    config.shards,\n', '', _FLAGS),
  ('bcq', 'sticky_action_probability=config.sticky_action_probability,', '', _FLAGS),
  ('cql', '    rom_dir=config.rom_dir,\n', '', _FLAGS),
  ('rem', 'config.environment_name, config.rom_dir)', 'config.environment_name)', _MAIN),
  ('bcq', '    logging.warning(note)\n', '    pass\n', _MAIN),
  ('qrdqn', 'eval_epsilon=config.eval_epsilon', 'eval_epsilon=0.001', _FLAGS),
  ('rem', 'batch_size=config.batch_size', 'batch_size=32', _FLAGS),
  ('cql', '=config.target_network_update_period', '=2_000', _FLAGS),
  ('dqn', 'progress, config.num_updates_per_iteration', 'progress, 62_500', _FLAGS),
  ('qrdqn', 'learner.data = logs.resident(progress.iteration, config.num_iterations)',
   'learner.data = data', _MAIN),
  ('rem', 'logs.resident(progress.iteration, config.num_iterations)',
   'logs.resident(1, config.num_iterations)', _MAIN),
  ('cql', 'make_environment, logs.mean_episode_return', 'make_environment, 0.0', _MAIN),
  ('bcq', '    evaluator.finish(stop)\n', '', _MAIN),
  ('rem', '    evaluator.save_unfinished(progress)\n', '    pass\n',
   'run_atari_test.py::test_a_run_goes_on_where_it_was_stopped'),
  ('cql', 'agent_name=pathlib.Path(__file__).parent.name', "agent_name='dqn'", _FLAGS),
  ('qrdqn', 'from . import agent', 'from offline_zoo.dqn import agent',
   'test_a_directory_uses_its_own_files_and_no_other_agents'),
  ('dqn', 'target_network_update_period: int = 2_000', 'target_network_update_period: int = 8_000',
   _DEFAULTS),
  ('qrdqn', 'learning_rate: float = 0.00005', 'learning_rate: float = 0.0005', _DEFAULTS),
  ('bcq', 'target_network_update_period: int = 8_000', 'target_network_update_period: int = 2_000',
   _DEFAULTS),
  ('qrdqn', ' config.num_quantiles, ', ' 200, ', _FLAGS),
  ('cql', ' config.num_quantiles, ', ' 200, ', _FLAGS),
  ('cql', 'alpha=config.alpha', 'alpha=1.0', _FLAGS),
  ('cql', 'double_q=config.double_q', 'double_q=False', _FLAGS),
  ('rem', '(num_actions, config.num_heads, ', '(num_actions, 200, ', _FLAGS),
  ('rem', 'num_mixtures=config.num_mixtures', 'num_mixtures=1', _FLAGS),
  ('rem', 'ensemble=config.ensemble', 'ensemble=False', _FLAGS),
  ('bcq', 'threshold=config.threshold', 'threshold=0.3', _FLAGS),
  ('bcq', 'behaviour_weight=config.behaviour_weight', 'behaviour_weight=config.logits_penalty',
   _FLAGS),
  ('bcq', 'logits_penalty=config.logits_penalty', 'logits_penalty=config.behaviour_weight', _FLAGS),
  ('bc', 'penalty=config.penalty', 'penalty=0.5', _FLAGS),
  ('bc', 'eps=config.adam_epsilon', 'eps=1e-8', _FLAGS),
  ('c51', 'config.vmax, config.num_atoms,', 'config.vmax, 51,', _FLAGS),
  ('c51', 'double_q=config.double_q', 'double_q=True', _FLAGS),
  ('crr', 'mode=config.mode', "mode='exp'", _FLAGS),
  ('crr', 'beta=config.beta', 'beta=1.0', _FLAGS),
  ('crr', 'max_weight=config.max_weight', 'max_weight=config.min_q_weight', _FLAGS),
  ('crr', 'sample_actions=config.sample_actions', 'sample_actions=True', _FLAGS),
  ('multi_network_rem', 'num_networks=config.num_networks', 'num_networks=4', _FLAGS),
  ('multi_network_rem', 'ensemble=config.ensemble', 'ensemble=True', _FLAGS),
  ('off_policy_dqn', 'target_epsilon=config.target_epsilon', 'target_epsilon=config.eval_epsilon',
   _FLAGS),
  ('off_policy_dqn', 'min_ratio=config.min_ratio', 'min_ratio=config.max_ratio', _FLAGS),
  ('off_policy_dqn', 'first_ratio=config.first_ratio', 'first_ratio=True', _FLAGS),
  ('off_policy_dqn', '    with_probabilities=True,\n', '',
   'run_atari_test.py::test_a_run_goes_on_where_it_was_stopped'),
]  # fmt: skip

# What only one agent has, and its own agent_test.py must notice: (agent, old text, new text, test).
OWN = [
  ('dqn', 'rlax.huber_loss(td_errors, delta=1.0)', 'jnp.square(td_errors)', 'test_a_loss_by_hand'),
  ('dqn', 'network.apply(state.target_params, batch.s_t).q_values',
   'network.apply(online_params, batch.s_t).q_values',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('qrdqn', ' + 0.5) / num_quantiles', ' + 1.0) / num_quantiles', 'test_a_loss_by_hand'),
  ('qrdqn', 'dist_q_target_t, dist_q_target_t, 1.0\n', 'dist_q_target_t, dist_q_target_t, 0.0\n',
   'test_a_loss_by_hand'),
  ('rem', 'random_mixtures(mixture_key,', 'random_mixtures(jax.random.PRNGKey(0),',
   'test_mixtures_are_new_in_every_update_and_do_not_share_the_batchs_key'),
  ('rem', 'random_mixtures(mixture_key,', 'random_mixtures(sample_key,',
   'test_mixtures_are_new_in_every_update_and_do_not_share_the_batchs_key'),
  ('rem', 'q_heads_target_t @ mixtures\n', 'q_heads_target_t @ mixtures[::-1]\n',
   'test_losses_and_gradients_equal_batch_rls'),
  ('rem', 'draws / jnp.sum(draws, axis=0, keepdims=True)', 'jax.nn.softmax(draws, axis=0)',
   'test_mixtures_are_random_convex_combinations'),
  ('rem', 'mixtures = jnp.eye(num_heads)', 'mixtures = jnp.ones((num_heads, 1)) / num_heads',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('cql', 'td_losses + alpha * conservative_loss', 'td_losses + conservative_loss',
   'test_losses_and_gradients_equal_recorded_ones'),
  ('cql', 'if double_q else target_t', 'if not double_q else target_t',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('cql', 'jax.nn.logsumexp(q_tm1, axis=-1) - ', 'jnp.max(q_tm1, axis=-1) - ',
   'test_conservative_losses_equal_recorded_ones'),
  ('bcq', '> jnp.log(threshold)', '>= jnp.log(threshold)',
   'test_the_threshold_itself_is_not_allowed'),
  ('bcq', '> jnp.log(threshold)', '> threshold - 1',
   'test_masks_and_greedy_actions_equal_the_authors'),
  ('bcq', '_t = masked_values(online_t.q_values, online_t.behaviour_logits, threshold)[0]',
   '_t = online_t.q_values[0]', 'test_acting_obeys_the_mask'),
  ('bcq', '+ logits_penalty * jnp.mean(', '+ logits_penalty * jnp.sum(',
   'test_losses_and_gradients_equal_the_authors'),
  ('bcq', '          online_t.q_values,\n', '          target_t.q_values,\n',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('bc', 'return penalty * squares - ', 'return squares - ',
   'test_losses_and_gradients_equal_tianshous'),
  ('bc', "'accuracy': jnp.mean(", "'accuracy': jnp.sum(",
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('crr', "'weight': jnp.mean(weights)", "'weight': jnp.max(weights)",
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('off_policy_dqn', 'jnp.average(weights, weights=batch.discount > 0)', 'jnp.average(weights)',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('bc', 'jnp.square(log_policy)', 'jnp.square(logits_tm1)',
   'test_penalised_losses_and_gradients_equal_d3rlpys'),
  ('c51', 'jnp.asarray(atoms),\n', '-jnp.asarray(atoms)[::-1] * 2,\n',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('c51', 'atoms, q_logits_target_t, q_selector_t', 'atoms, q_logits_target_t, -q_selector_t',
   'test_losses_and_gradients_equal_recorded_ones'),
  ('c51', 'if double_q else target_t', 'if not double_q else target_t',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('crr', 'rlax.l2_loss(td_errors)', '2 * rlax.l2_loss(td_errors)',
   'test_losses_and_gradients_equal_recorded_ones'),
  ('crr', '    - weights * rlax', '    - rlax', 'test_losses_and_gradients_equal_recorded_ones'),
  ('crr', '+ min_q_weight * conservative', '+ conservative',
   'test_losses_and_gradients_equal_recorded_ones'),
  ('crr', 'policy_target_t = jax.nn.softmax(policy_logits_target_t)',
   'policy_target_t = jax.nn.softmax(policy_logits_tm1)',
   'test_losses_and_gradients_equal_recorded_ones'),
  ('crr', '          target_t.policy_logits,\n', '          policy_logits_tm1,\n',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('multi_network_rem', 'q_networks_target_t @ mixtures\n', 'q_networks_target_t\n',
   'test_losses_and_gradients_equal_batch_rls'),
  ('multi_network_rem', 'jnp.mean(rlax.huber_loss(td_errors', 'jnp.sum(rlax.huber_loss(td_errors',
   'test_losses_and_gradients_equal_batch_rls'),
  ('multi_network_rem', 'mixtures = jnp.eye(num_networks)',
   'mixtures = jnp.ones((num_networks, 1))', 'test_an_ensemble_is_as_many_dqns'),
  ('multi_network_rem', 'q_networks(state.target_params, batch.s_t)',
   'q_networks(online_params, batch.s_t)', 'test_an_update_is_a_gradient_step_on_the_loss'),
  ('off_policy_dqn', 'discount * weights * r,', 'discount * r,',
   'test_losses_and_gradients_equal_recorded_ones'),
  ('off_policy_dqn', '          q_target[:, -1],\n', '          q_target[:, 1],\n',
   'test_an_update_is_a_gradient_step_on_the_loss'),
  ('off_policy_dqn', '        q_target[:, :-1],\n', '        q_target[:, 1:],\n',
   'test_an_update_is_a_gradient_step_on_the_loss'),
]  # fmt: skip


def all_edits() -> list[Edit]:
  """All edits, in the order of the lists above."""
  edits = [Edit(file, *edit) for file, of_file in EDITS.items() for edit in of_file]
  for name, shared in (('agent', SHARED_IN_AGENT), ('run_atari', SHARED_IN_RUN_ATARI)):
    for agent, old, new, test in shared:
      test = test if '::' in test else f'agents_test.py::{test}'
      edits.append(Edit(f'{agent}/{name}.py', old, new, f'{test}[{agent}]'))
  for agent, old, new, test in OWN:
    edits.append(Edit(f'{agent}/agent.py', old, new, f'{agent}/agent_test.py::{test}'))
  return edits


# What takes seconds to import, and is not ours.
LIBRARIES = [
  'ale_py', 'chex', 'cv2', 'gymnasium', 'haiku', 'numba', 'optax', 'orbax.checkpoint', 'psutil',
  'pytest', 'rlax',
]  # fmt: skip


def run_pytest(directory: pathlib.Path, tests: list[str], output: pathlib.Path) -> None:
  """Runs tests in a process of its own, and ends it with pytest's exit code."""
  import pytest

  os.setsid()  # so that what it starts can be killed with it
  os.chdir(directory)
  with open(output, 'w') as file:
    for descriptor in (1, 2):
      os.dup2(file.fileno(), descriptor)
  sys.path.insert(0, str(directory))
  os.environ['PYTHONPATH'] = str(directory)
  nodes = [f'offline_zoo/{test}' for test in tests]
  code = pytest.main(['-x', '-n', '0', '-p', 'no:cacheprovider', *nodes])
  sys.stdout.flush()
  os._exit(code)


class Checkout:
  """A copy of what the tests need, to be spoilt."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    shutil.copytree(ROOT / 'offline_zoo', directory / 'offline_zoo')
    shutil.copytree(ROOT / 'tests', directory / 'tests')
    shutil.copy(ROOT / 'pyproject.toml', directory)

  def run_tests(self, tests: list[str], seconds: float | None = None) -> tuple[int | None, str]:
    """Runs tests up to the first that fails; returns pytest's exit code, None after a timeout."""
    output = self._directory / 'output'
    context = multiprocessing.get_context('forkserver')
    process = context.Process(target=run_pytest, args=(self._directory, tests, output))
    process.start()
    process.join(seconds)
    if process.exitcode is None and process.pid is not None:
      os.killpg(process.pid, signal.SIGKILL)
      process.join()
      return None, ''
    return process.exitcode, output.read_text()

  def try_edit(self, edit: Edit, seconds: float) -> str:
    """Applies an edit, runs its tests, takes it back; says what became of it."""
    path = self._directory / 'offline_zoo' / edit.file
    text = path.read_text()
    path.write_text(text.replace(edit.old, edit.new))
    start = time.monotonic()
    try:
      code, output = self.run_tests([edit.test], seconds)
    finally:
      path.write_text(text)
    took = f'{time.monotonic() - start:.0f} s'
    if code is None:
      return f'SLOW: not caught within {seconds:.0f} s'
    if code == 0:
      return f'SURVIVED, {took}'
    # Else it is no careless edit but one that Python itself refuses, or there is no such test.
    return f'caught, {took}' if code == 1 else f'BROKEN: pytest ended with {code}: {output[-300:]}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--processes', type=int, default=2, help='tests run at a time')
  parser.add_argument('--seconds', type=float, default=60.0, help='within which to be caught')
  parser.add_argument('--only', default='', help='edits whose file or test contains this')
  parser.add_argument('--list', action='store_true', help='only lists the edits')
  args = parser.parse_args()

  edits = [e for e in all_edits() if args.only in e.file or args.only in e.test]
  for edit in edits:
    if (count := (ROOT / 'offline_zoo' / edit.file).read_text().count(edit.old)) != 1:
      sys.exit(f'{edit.file}: {edit.old!r} is there {count} times; expected once')
  if args.list:
    for edit in edits:
      print(f'{edit.file}: {edit.old!r} -> {edit.new!r}: {edit.test}')
    return
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'PYTHONDONTWRITEBYTECODE': '1'}
  multiprocessing.get_context('forkserver').set_forkserver_preload(LIBRARIES)
  with (
    tempfile.TemporaryDirectory() as directory,
    concurrent.futures.ThreadPoolExecutor(args.processes) as pool,
  ):
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(directory, 'compiled'))
    checkouts: queue.Queue[Checkout] = queue.Queue()
    for i in range(args.processes):
      checkouts.put(Checkout(pathlib.Path(directory, str(i))))

    def in_a_checkout(function):
      checkout = checkouts.get()
      try:
        return function(checkout)
      finally:
        checkouts.put(checkout)

    tests = list(dict.fromkeys(edit.test for edit in edits))
    shares = [tests[i :: args.processes] for i in range(args.processes)]
    for code, output in pool.map(lambda x: in_a_checkout(lambda c: c.run_tests(x)), shares):
      if code:
        sys.exit(f'{output}\nThe tests fail without an edit.')
    print(f'{len(tests)} tests pass without an edit', flush=True)

    verdicts = pool.map(lambda e: in_a_checkout(lambda c: c.try_edit(e, args.seconds)), edits)
    bad = 0
    for number, (edit, verdict) in enumerate(zip(edits, verdicts, strict=True), 1):
      bad += not verdict.startswith('caught')
      print(f'{number:3} {edit.file}: {edit.old!r} -> {edit.new!r}: {verdict}', flush=True)
  print(f'{len(edits)} edits, {len(edits) - bad} caught, {bad} not')
  sys.exit(bad > 0)


if __name__ == '__main__':
  main()
