"""A benchmark of real conflicts: one question, and the right answer depends on the country.

``places`` lists the countries, ``sources`` and ``calendars`` read true facts from packages,
``kinds`` says what can be asked with the sentences of ``wordings`` and ``holiday_wordings``,
``facts`` tells conflicts from local facts and draws distractors, ``universal`` chooses what all
clients share, ``sets`` makes the files and ``card`` the data card. ``states`` makes the same of
one country's states.
"""
