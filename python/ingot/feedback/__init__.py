"""Collecting human preferences: showing responses blind, keeping every judgement, and knowing what the judgements are worth.

``records`` what is kept of a judgement; ``journal`` the file it is added to; ``pairs`` preference rows from it; ``candidates`` what
is to be judged; ``criteria`` by what; ``schedule`` in which order; ``session`` one labeller's way through it; ``answers``,
``display`` and ``terminal`` the keyboard and the screen; ``coefficients``, ``orderings`` and ``agreement`` the statistics;
``simulate`` labellers of known quality.
"""
