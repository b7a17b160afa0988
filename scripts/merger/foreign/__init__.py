"""The gates that everything foreign passes: files, archives, JSON documents, values of a pickle, text.

What others wrote is used for nothing before it went through one of these:

- `files`: regular files only, known by what they were when first looked at, and the same at every later use;
- `archives`: zip directories, read no more leniently than torch reads them;
- `documents`: JSON, of limited size, depth and numbers, without duplicate keys;
- `values`: what a pickle or a header calls a shape, a name, a mesh;
- `limits`: work on foreign data in a process whose time and memory are limited;
- `text`: what is printed, or written into a page, of names and messages that others chose.
"""
