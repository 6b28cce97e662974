"""Traces: what was asked of a serving system, and when.

types        a request of a trace, and what a trace is
lines        whole lines of a file, compressed or not, in bounded memory
formats      the formats, sibling files of one shape: mooncake, bailian, azure, burstgpt
files        detecting, checking, reading and writing trace files
stats        what a trace is like, in one pass
options      what a synthetic trace is to be like
arrivals     when its requests arrive
prefix_tree  how its prompts share prefixes
synth        all of it together
"""
