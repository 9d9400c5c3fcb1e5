"""A benchmark of real conflicts: one question, and the right answer depends on the country.

``places`` lists the countries; ``sources``, ``locales`` and ``calendars`` read true facts from
packages, and ``kinds`` says what can be asked, with the sentences of the three modules of
wordings. ``facts`` tells conflicts from local facts, ``universal`` draws what is true for all, and
``records`` puts facts into words with wrong answers beside them. Three settings are made of this:
``sets`` (clients are countries), ``entangled`` (local and universal questions differ in a name
only) and ``states`` (clients are the states of one country). ``card`` describes what was made.
"""
