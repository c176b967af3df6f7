// Beginnings that show something. The first ones are for looking: what does "it" look at, what does
// a word look at that has two meanings, what does an order of words mean. The others suit a model
// that tells small stories.

export const EXAMPLES = [
  { text: "Once upon a time there was a little" },
  { text: "Tom and his dog went to the park. They saw a big" },
  { text: "Lily was sad because she lost her red ball. Her mom said," },
  { text: "The animal didn't cross the street because it was too tired", look: "it" },
  { text: "The cat drank the milk because it was hungry", look: "it" },
  { text: "Alice will eat pizza", look: "eat" },
  { text: "Dog bites man", look: "bites" },
  { text: "Man bites dog", look: "bites" },
];
