"""Who answers: the engines behind one small protocol."""
