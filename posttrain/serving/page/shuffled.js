/** Returns the things in random order; all orders are equally likely, which a random comparison in sort would not give. */
export function shuffled(things) {
  const drawn = things.map((thing) => ({ thing, key: Math.random() }));
  return drawn.sort((a, b) => a.key - b.key).map(({ thing }) => thing);
}
