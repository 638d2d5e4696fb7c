"""Whether two answers in mathematics are the same, different, or not to be decided: exact, symmetric, without a clock.

reward        `math_answer`, the reward of a run; conventions are its options
comparison    `compare`, the decision on two texts; start here
reading       text -> an answer: cleaning, then plain numbers by one expression, units, and the parser
expression    what an answer can be
reduction     expressions -> normal form, a quotient of polynomials, in which equality is an identity
numbers       equality of expressions; intervals at growing precision where no identity decides
equations, regions   equations and inequalities; unions of intervals
"""
