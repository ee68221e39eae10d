"""Dataflow over Ray Data: corpus to pre-masked shards, prompts to completions."""
