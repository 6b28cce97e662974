"""The torch engine: any causal LM of the transformers library, with our paged KV behind its attention interface.

The only room that imports torch and transformers. Whoever imports it must have set OMP_WAIT_POLICY=passive before
(`mooncake.config.engine_environment`): OpenMP threads that spin collapse a step when instances share cores.
"""
