// Beginnings that show something. The first ones suit a model that tells small stories. The others
// are for looking: what does "it" mean, who eats what, who bites whom. Of those the token `look` is
// chosen, and the head that looks most from it at `at`, whichever that is in the model that is served.

export const EXAMPLES = [
  { text: "Once upon a time there was a little" },
  { text: "Tom and his dog went to the park. They saw a big" },
  { text: "Lily was sad because she lost her red ball. Her mom said," },
  { text: "The animal didn't cross the street because it was too tired", look: "it", at: "animal" },
  { text: "The cat drank the milk because it was hungry", look: "it", at: "cat" },
  { text: "Alice will eat pizza", look: "pizza", at: "eat" },
  { text: "Dog bites man", look: "man", at: "Dog" },
  { text: "Man bites dog", look: "dog", at: "Man" },
];
