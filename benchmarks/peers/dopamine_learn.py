"""Serves Dopamine's own JAX agents, learning from logged play, to `benchmarks.learn`.

This runs in a virtual environment of its own (README.md says how to make it) and imports nothing
of ours; protocol.py says what is asked and answered. Agents, train steps, replay memory and
sampling are Dopamine's, untouched; only hyperparameters are set, and the memory is filled.

Algorithms: dqn (JaxDQNAgent), qrdqn (JaxQuantileAgent), c51 (JaxRainbowAgent without its additions:
one step, uniform replay). Networks have SAME padding. A target's copy is made every 2,000 updates.
"""

import sys
import types

import protocol
from logged_play import BATCH_SIZE, FRAME_SHAPE, STACK, first_rows, learner_parser

# Dopamine's Atari module imports OpenAI's baselines, which dopamine-rl does not declare. Only its
# environments for PPO use it, and no environment is made here, so empty modules will do.
for _name in ('baselines', 'baselines.common', 'baselines.common.atari_wrappers'):
  sys.modules[_name] = types.ModuleType(_name)

PACKAGES = (
  'dopamine-rl',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'numpy',
  'tensorflow-cpu',
  'tfp-nightly',
)
# Settings of gin's create_optimizer.
RMSPROP = {  # as in Dopamine's configuration of the Nature paper's DQN
  'name': 'rmsprop',
  'learning_rate': 2.5e-4,
  'beta2': 0.95,  # the decay: Dopamine hands it to optax under this name
  'eps': 1e-5,
  'centered': True,
}
ADAM = {'name': 'adam', 'learning_rate': 5e-5, 'eps': 0.01 / 32}


def make_agent(algorithm, num_actions, capacity, seed):
  """Makes an agent for Atari, set to train at each of its steps.

  Args:
    algorithm: Its name, see above.
    num_actions: How many actions the network values.
    capacity: How many transitions the memory holds.
    seed: Seed of the network's parameters and of the sampling.

  Returns:
    The agent.
  """
  import gin
  from dopamine.jax.agents.dqn import dqn_agent
  from dopamine.jax.agents.quantile import quantile_agent
  from dopamine.jax.agents.rainbow import rainbow_agent

  agents: dict[str, tuple[type, dict, dict]] = {
    'dqn': (dqn_agent.JaxDQNAgent, RMSPROP, {'loss_type': 'huber'}),
    'qrdqn': (
      quantile_agent.JaxQuantileAgent,
      ADAM,
      {'num_atoms': 200, 'replay_scheme': 'uniform'},
    ),
    'c51': (
      rainbow_agent.JaxRainbowAgent,
      ADAM,
      {'num_atoms': 51, 'vmax': 10.0, 'replay_scheme': 'uniform'},
    ),
  }
  agent_class, optimizer, settings = agents[algorithm]
  for name, value in optimizer.items():
    gin.bind_parameter(f'create_optimizer.{name}', value)
  gin.bind_parameter('ReplayBuffer.batch_size', BATCH_SIZE)
  for name in ('ReplayBuffer', 'PrioritizedSamplingDistribution'):
    gin.bind_parameter(f'{name}.max_capacity', capacity)
  return agent_class(
    num_actions=num_actions,
    observation_shape=FRAME_SHAPE,
    stack_size=STACK,
    gamma=0.99,
    update_horizon=1,
    min_replay_history=0,
    update_period=1,  # unit: agent steps; 4 when it plays
    target_update_period=2000,  # unit: agent steps, here updates
    optimizer=optimizer['name'],
    summary_writer=None,
    seed=seed,
    **settings,
  )


def main():
  """Serves updates until the input ends."""
  args = learner_parser(__doc__).parse_args()

  replies = protocol.take_stdout()
  rows = first_rows(args.replay_dir, args.transitions)

  def make(algorithm):
    import jax

    agent = make_agent(algorithm, args.num_actions, args.transitions, args.seed)
    for frame, action, reward, terminal, last in rows:
      agent._store_transition(  # pylint: disable=protected-access
        frame, action, reward, terminal, episode_end=last
      )

    def learn(updates):
      for _ in range(updates):
        agent._train_step()  # pylint: disable=protected-access
      jax.block_until_ready((agent.online_params, agent.optimizer_state))

    return protocol.Learner(learn)

  protocol.serve_learners(replies, PACKAGES, make)


if __name__ == '__main__':
  main()
