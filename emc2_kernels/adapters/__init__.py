"""The losses under the calls that other libraries make of theirs, a module a library: ``adapters.open_clip``,
``adapters.metric_learning``, ``adapters.sentence_transformers``.

A module is imported by its name, and imports its library where it needs it; importing this package imports none.
lightly's criteria are called as the losses are, and need no adapter: ``data.ItemNumbers`` numbers its file names.
"""
