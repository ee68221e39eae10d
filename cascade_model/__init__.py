"""The science of CASCADE in plain PyTorch; it never imports ray.

Reading order, which is the order of the data: config, errors, schema, noise, commit, lease,
tokenizer, shards, corpus (these load no torch), batch, attention, kv_cache, model, weights,
families, loss, distillation, optim, parallel, checkpoint, metrics, trainer, evaluation, unmasking,
sampler, engine, llm.
This package imports nothing here, so that data workers stay light.
"""
