"""vLLM as an engine: the only room that imports it.

One KV connector carries KV between vLLM's pages and the store. It is used in two ways:

* stock `vllm serve` names it by `kv_connector_module_path` (`connector`), and needs no other part of this system than a store;
* `mooncake serve --engine vllm` drives vLLM's AsyncLLM as an `Engine` of our prefill and decode services (`engine`).

    connector        vLLM's classes on one side, ours on the other; the only file that knows both
      scheduler_side   decides what is loaded and saved in each step (sans-IO)
      worker_side      copies KV between pages and objects, in threads of its own
      requests         what a request of vLLM is in our words: its keys, and what is wanted of it
      options, layout, versions    settings, the shape of KV, the releases of vLLM that this was tested with

Only `connector`, `pages` and `engine` need vLLM or torch to be imported.
"""
