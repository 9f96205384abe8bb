"""The paper's findings at a scale that two cores hold: small runs, their results, and what they show."""
