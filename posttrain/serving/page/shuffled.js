/** The same things in an order by chance, each of all orders as likely as any other (which sorting by a coin does not give). */
export function shuffled(things) {
  const drawn = things.map((thing) => ({ thing, key: Math.random() }));
  return drawn.sort((a, b) => a.key - b.key).map(({ thing }) => thing);
}
