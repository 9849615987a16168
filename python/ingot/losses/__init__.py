"""Objectives as pure functions: arrays in, loss and analytic gradients out.

==============  ================================================================================
module          what it trains
==============  ================================================================================
next_token      a language model, from text
sft             the same from answers: which tokens count, smoothing
reward          a score of responses, from comparisons, rankings or ratings
preference      a policy, straight from comparisons
advantages, kl  what sampled actions were worth, and how far the policy is from its reference
policy          a policy, from advantages: PPO, group methods, REINFORCE
distillation    a student, from a teacher's probabilities
best_of_n       nothing: what choosing among n samples gains and costs
==============  ================================================================================

All follow the index conventions of :mod:`ingot.losses.packed` and compute in f64. Gradients by token are f32, as models take them.
"""
