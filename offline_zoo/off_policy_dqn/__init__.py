"""Off-policy n-step DQN: Precup et al. 2000, "Eligibility Traces for Off-Policy Evaluation"."""
