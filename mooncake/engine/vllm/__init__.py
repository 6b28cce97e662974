"""vLLM as an engine: the only room that imports it.

One KV connector carries KV between vLLM's pages and the store. It is used in two ways:

* stock `vllm serve` names it by `kv_connector_module_path`, and needs no other part of this system than a store;
* `mooncake serve --engine vllm` drives vLLM's AsyncLLM as an `Engine` of our prefill and decode services.

    connector           vLLM's classes on one side, ours on the other; the only file that knows its connector interface
      scheduler_side    decides what is loaded and saved in each step (sans-IO); `plans` are its answers
      requests          what a request of vLLM is in our words: its keys, and what is wanted of it
      worker_side       copies KV between `pages` and `objects` of the store, in threads of its own
      options, layout   settings; the shape of KV
    engine              AsyncLLM as an Engine
      arguments         from our configuration and jobs to vLLM's
      books             what it runs, and what it tells our services (sans-IO)
      feed, events      reads vLLM's KV events; which blocks are cached follows from them (sans-IO)
      measure           calibrates
    versions            the releases of vLLM that this was tested with

`connector`, `pages`, `feed` and `engine` need vLLM's environment; the rest does not.
"""
