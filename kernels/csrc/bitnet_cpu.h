// The C ABI of the native CPU kernels. No torch, no exceptions; functions that can fail return a Status.
//
// Form A, 2 bits a weight ("prepacked"): uint8 [ceil(N/32), ceil(K/16), 128]. The 128 bytes of block i, step g hold
// rows 32i..32i+31 and features 16g..16g+15: bytes 4r..4r+3 are row 32i + r, and bits 2j..2j+1 of byte b are feature
// 4j + b, as code + 1. So one 32-bit lane of a vector is one row, products need no horizontal sums, and a thread that
// works on consecutive rows reads one linear stream. Padding (rows beyond N, features beyond K) holds code 0.
//
// Form B, 1.6 bits a weight: uint8 [ceil(N/32), ceil(K/20), 128], where a byte holds five codes, t0 + 3 t1 + 9 t2 +
// 27 t3 + 84 t4 with t in 0..2. Step g has features 20g..20g+19; tj of byte b is feature 4j + b. 84 and not 81,
// because t4 then depends on the upper six bits alone, which is what one table lookup takes.
//
// Form C, 8 bits a weight (output heads): uint8 [ceil(N/32), ceil(K/4), 128], where a byte is any int8 code + 128.
//
// Form D, 1 bit a weight (binary weights: no zeros): uint8 [ceil(N/32), ceil(K/32), 128]. Step g has features
// 32g..32g+31: bit j of byte 4r + b of block i is feature 4j + b of row 32i + r: 1 for the code +1, 0 for -1.
//
// Form E, 4 bits a weight (output heads): uint8 [ceil(N/32), ceil(K/8), 128]. Step g has features 8g..8g+7: the low four
// bits of byte 4r + b of block i are feature b of row 32i + r, the high ones feature 4 + b, as code + 8. It takes scales of
// groups of 32 features only.
//
// Form F, 1 bit a weight for look-ups of four at a time: form D whose 128 bytes of a step are transposed. Byte 4r + b there
// is byte 32b + (r / 8 * 4 + r % 4 + r / 4 % 2 * 16) here: a 256-bit vector holds two look-ups for each row, and what is
// then widened within its halves, bytes to 16 bits to 32, comes out in the order of rows.
//
// bitnet_step runs the decoder blocks of a model over some tokens of some sequences, and keeps their keys and values.
#pragma once
#include <stdint.h>

#define BITNET_EXPORT extern "C" __attribute__((visibility("default")))

enum Status { kOk = 0, kBadType = 1, kBadShape = 2, kBadIsa = 3, kNoMemory = 4, kBadCode = 5 };
enum Form { kTwoBits = 0, kBase3 = 1, kEightBits = 2, kOneBit = 3, kFourBits = 4, kOneBitTables = 5 };
enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt32 = 4, kInt16 = 5 };

// One layer, filled in by the caller and only read here.
struct PreparedWeight {
  const uint8_t* weight;
  const void* scale;      // multiplies. float32 [1], or [n] if per_row; with group_size float16 [ceil(n/32), groups, 32]
  const void* bias;       // [n] of bias_type, or null
  int64_t n, k;
  int64_t group_size;     // features that share a scale in a row, a multiple of 32 that divides 256; 0: all
  int32_t per_row;
  int32_t bias_type;
  int32_t form;
  int32_t activation_bits;  // 16, 8 or 4, to which float x is quantized
  int32_t isa;  // index into bitnet_isa(form)
};

// y = x / sqrt(mean(x^2) + eps) * weight, of x less its mean if `centered` (LayerNorm), plus bias if there is one. A null
// weight: no norm.
struct Norm {
  const float* weight;
  const float* bias;
  float eps;
  int32_t centered;
};

// Layers that share an input x: norms of x one after the other, the Walsh-Hadamard transform in blocks (0: none), then
// each layer's product.
struct Product {
  Norm norms[2];
  const int8_t* signs;  // of the transform, [k] or null
  int64_t hadamard;
  int64_t count;
  const PreparedWeight* layers[6];
};

// How the `in` of a block with the gated delta rule give queries, keys and values, which are convolved, the gate z of the
// outputs, what a new value weighs, and how fast the state fades: in four layers; in two, of which the first has q, k, v and z
// and the other the rest, those of a key's head one after the other; or in six. Of a state space one layer has gates, then x, b
// and c, which are convolved, and how long each head's step is.
enum Parts { kFourLayers = 0, kByKeyHead = 1, kSixLayers = 2, kStateSpace = 3 };

// What is in place of attention. Linear attention by the gated delta rule; a state space (Mamba-2: arXiv 2405.21060), whose
// values are x, keys b and queries c; or, where value_heads is 0, a short convolution: `in` is one layer of three parts b, c
// and x, and y = c * convolution(b * x).
struct Recurrence {
  const float* convolution;  // [kernel, channels]; of heads followed by silu
  const float* bias;         // of the convolution, [channels], or null
  const float* skip;         // [value_heads]: of a state space, what of x is added to what is read
  const float* speed;        // [value_heads]: the state of a token becomes exp(-speed * log(1 + exp(x + shift))) of it
  const float* shift;
  Norm norm;                 // of each head's outputs, before they are multiplied by silu(z); or after that, of norm_size features
  int64_t norm_size;
  int64_t kernel, channels;  // channels: 2 * key_heads * key_dim + value_heads * value_dim
  int64_t key_heads, value_heads, key_dim, value_dim;  // value_dim: a multiple of 32
  float most;                // that a new value weighs: the sigmoid of its weight times this
  float shortest;            // step of a state space
  int32_t parts;
};

// What scores of experts become: a softmax or sigmoids, of which some are chosen, or a softmax of those chosen.
enum Score { kSoftmax = 0, kSigmoids = 1, kSoftmaxOfChosen = 2 };

// Experts of which each token takes a few: y is the sum of second(f(gate) * up) of each times its weight, where gate and up
// are the halves of first(norm(x)); or of second(f(first(norm(x)))), where the plan is not gated.
struct Mixture {
  Norm norm;
  Norm router_norm;           // of what the router sees, if not that
  Norm after, beside;         // of the sum, and of what the block's own MLP gives, before both are added; both or neither
  const void* router;         // [experts, hidden] of router_type; a row more if shared_gate
  const float* bias;          // of the router, as many; null: none
  const float* correction;    // added to scores where experts are chosen, but not to their weights; null: nothing is
  int64_t experts, chosen;
  int64_t groups, groups_chosen;  // experts are chosen from so many of these groups of neighbours,
  int64_t group_best;         // whose so many greatest scores have the greatest sums
  int64_t inner;              // features between the halves and second
  const PreparedWeight* const* first;   // [experts]
  const PreparedWeight* const* second;  // [experts]
  float added, least;         // weights are divided by their sum + added, or by least if it is greater, if `normalized`
  float factor;               // and multiplied by this
  const float* factors;       // [experts]: and by this; null: 1
  int32_t score;
  int32_t normalized;
  int32_t router_type;
  int32_t shared_gate;        // the sigmoid of the router's last score multiplies what the block's own MLP gives
};

// The heads of a block's attention; features are multiples of 16.
struct HeadShape {
  int64_t heads, kv_heads, key_dim, value_dim;
};

// Latent attention (arXiv 2405.04434, section 2.1): the block's `in` are two layers. The first gives queries, or what `query`
// makes them of; the second latents, `rank` features that a norm is taken of and `expand` makes keys and values of, those of a
// head one after the other, and then features that turn by position and are the last of every head's key.
struct Latent {
  Product query;    // or one without layers
  Product expand;
  Norm norm;
  int64_t rank;
  int64_t query_rank;
};

// Where in a sequence's caches a block's are: how many features (scales: heads) of others' come before, for each position.
struct CachePlace {
  int64_t keys, values, scales, latents;
};

// What a token's identity adds to each block after its MLP: x += after(projection(f(gate(x)) * its features)).
struct PerLayer {
  Product gate, projection;
  Norm after;
};

// One decoder block: x += after_attention(out(attention(in(x)))), then x += after_mlp(down(f(gate(x)) * up(x))), what is
// added times the plan's `residual`. If `parallel`, both see the x that came in. A block with a mixture adds that of it to
// the MLP's, or has no MLP of its own. One of the two may be missing: then out.count is 0, or inner and mixture.
struct Block {
  Product in[4];    // q, k and v in this order, in as many products as `in_count`
  Product gate[2];  // gate and up, or the one layer before f
  Product out, down;
  Norm query, key;  // of each head, or if `whole` of all heads as one
  Norm value;       // of each head
  Norm after_attention, after_mlp;
  const Recurrence* recurrence;  // or null: attention
  const Mixture* mixture;        // or null; then not `parallel`
  const Latent* latent;          // or null; then one key and value for each head
  const PerLayer* per_layer;     // or null
  const float* sinks;            // [heads]: of each a score of nothing, which takes part in its softmax; null: there are none
  HeadShape heads;
  CachePlace cache;
  int64_t state;    // which of a sequence's states is this block's
  int64_t inner;    // features between gate and down; 0: there is no MLP, and gate_count is 0
  int64_t window;   // positions that a token sees, itself among them; 0: all
  int32_t in_count, gate_count;
  int32_t rope;     // which of the plan's tables; -1: no rotary positions
  int32_t whole, parallel;
  int32_t turned;   // positions come before the norms of queries and keys
  int32_t keys_only;  // values are what keys are before their norm: there is no v
  int32_t reads;    // keys and values are those that another block has stored: there is only q
  float scalar;     // multiplies x after the block
  float bend[4];    // of its gate: kXielu's two slopes, beta and eps, kClampedSwiglu's alpha and limit
};

// kXielu is equation 5 of arXiv 2411.13010. kClampedSwiglu, of experts alone, takes gate and up in turn, as gpt_oss's do, and
// not in halves. kSigmoid is that of queries.
enum Gate { kSilu = 0, kSquaredRelu = 1, kGeluTanh = 2, kGelu = 3, kRelu = 4, kXielu = 5, kClampedSwiglu = 6, kSigmoid = 7 };

// Rotary positions: features i and i + half turn together; or 2i and 2i + 1; or these, to become i and i + half.
enum Pairs { kHalves = 0, kNeighbours = 1, kNeighboursToHalves = 2 };

struct Rope {
  const float *cosine, *sine;  // [positions, half]
  int64_t half;                // half the features of a head that turn: at most 256
};

struct Plan {
  const Block* blocks;
  int64_t count;
  int64_t hidden;
  int64_t per_layer;         // features of a token's identity for each block; 0: none
  int64_t positions;         // of the tables
  Rope ropes[2];
  const float* position_scales;  // [positions], of queries; null: 1
  Norm final;
  float scaling;             // of scores
  float cap;                 // scores s become cap * tanh(s / cap); 0: they do not
  float residual;
  float clip;                // queries, keys and values lie within it; 0: they are left
  int32_t pairs;             // which features turn together
  int32_t by_head;           // one layer has q, k and v, those of a head one after the other; as many kv_heads as heads
  int32_t query_gate;        // sigmoids multiply heads' outputs, of a gate that follows a head's q; or, if 2, of a fourth `in`
  int32_t gate;
  int32_t gated;             // f(gate) * up; 0: f(gate)
  int32_t cache_type;        // kFloat32, kFloat16, or kInt8 with a float32 scale a position and head
  int32_t isa;               // index into bitnet_isa(kTwoBits)
};

// The cache of one sequence. Of the blocks with attention, one after the other, keys [kv_heads, capacity/16, key_dim, 16] and
// values [kv_heads, capacity, value_dim] of cache_type, scales [kv_heads, capacity], and of latent attention latents after their
// norm [capacity, rank], float16 or of a float32 cache float32 (null, where nobody asks for them). capacity is a multiple of
// 16. Of those with a recurrence states [blocks, value_heads, key_dim, value_dim] and windows [blocks, kernel - 1, channels], at
// first 0.
struct Sequence {
  void *keys, *values;
  float *key_scales, *value_scales;
  void* latents;
  float *states, *windows;
  int64_t capacity;
};

// Attention of a few tokens over keys and values as torch holds them: their last dimensions are contiguous, the strides of the
// others in elements. q [batch, heads, queries, dim], k [batch, kv_heads, positions, dim] and v [.., value_dim] of `type`;
// dim and value_dim are multiples of 16.
struct Attention {
  const void *q, *k, *v;
  const uint8_t* mask;  // [batch, heads, queries, positions], of bytes: 1 for what is seen; null: all is
  void* out;            // [batch, queries, heads, value_dim], contiguous; 0 for a query that sees nothing
  int64_t batch, heads, kv_heads, queries, positions, dim, value_dim;
  int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[3];  // of batch, head, and query or position
  float scaling;        // of scores
  int32_t type;
  int32_t isa;          // index into bitnet_isa(kTwoBits)
};

// A block of `count` columns of n rows, whose codes are chosen one after the other: by what is wanted (part), the error of
// each moved to those after it, or with `descend` by the slope of the error (part), given the codes before.
struct Columns {
  float* part;          // [n, count], rows part_stride apart; spoilt
  const float* corner;  // [count, count]
  const float* scale;   // [n, count], scale_row and scale_column apart
  float* codes;         // [n, count], rows codes_stride apart
  float* moved;         // [n, count]: the errors to be moved on, or the changes
  int64_t n, count, part_stride, scale_row, scale_column, codes_stride;
  int32_t descend, binary;
  int32_t isa;          // index into bitnet_isa(kTwoBits)
};

// Changes whenever anything in this file does, so that a stale build is noticed.
BITNET_EXPORT int32_t bitnet_abi();

// How many threads the kernels use of those wanted: 1 in a forked child, whose parent kept the pool's threads.
BITNET_EXPORT int32_t bitnet_threads(int32_t wanted);

// Name of the i-th instruction set that multiplies a form, best first, of those this library was compiled for and
// this CPU can run; null past the last.
BITNET_EXPORT const char* bitnet_isa(int32_t form, int32_t i);

// y [m, n] contiguous = x [m, k] (rows x_stride elements apart) times the layer, in at most `threads` threads.
//   x_type float: activations are quantized per token, y_type must equal x_type
//   x_type int8 or int16: x holds codes and s [m] their scales, which divide; y_type is float, or, but for scales of
//                 groups, int32 for bare accumulators
// Form C takes no scales of groups, form E those of 32 features only, and neither 16-bit activations.
BITNET_EXPORT int32_t bitnet_linear(const PreparedWeight* layer, const void* x, int32_t x_type, int64_t x_stride,
                                    const float* s, int64_t m, void* y, int32_t y_type, int32_t threads);

// x [m, hidden], the embeddings of m tokens, at most 256, becomes the last block's output after the final norm. Token i
// stands at position[i] of sequences[sequence[i]]; tokens of one sequence follow each other, position by position, and what
// is before them is in its cache, to which they are added. per_layer: [m, blocks, plan->per_layer], or null if there are none.
BITNET_EXPORT int32_t bitnet_step(const Plan* plan, float* x, const float* per_layer, int64_t m, const Sequence* sequences,
                                  const int64_t* sequence, const int64_t* position, int32_t threads);

BITNET_EXPORT int32_t bitnet_attention(const Attention* attention, int32_t threads);

// y [m, k] = norm of contiguous x [m, k], both of a float type; rounded once.
BITNET_EXPORT int32_t bitnet_norm(const Norm* norm, const void* x, int32_t type, int64_t m, int64_t k, void* y, int32_t isa);

// A weight to a form, and a form to codes int8 [n, k]. source: Hub bytes [ceil(n/4), k], or with from_codes, and always
// for form C, codes int8 [n, k]; for form E without from_codes [n, ceil(k/32), 16] bytes in the order of llama.cpp's Q4_0.
// Fails with kBadCode for Hub bytes with a field of 3, and forms D and F if a code is 0.
BITNET_EXPORT int32_t bitnet_prepack(const void* source, int32_t from_codes, int64_t n, int64_t k, uint8_t* weight,
                                     int32_t form, int32_t threads);
BITNET_EXPORT int32_t bitnet_unprepack(const uint8_t* weight, int64_t n, int64_t k, int8_t* codes, int32_t form,
                                       int32_t threads);

// Quantizers. isa: index into bitnet_isa(kTwoBits).

// Activation codes q [m, k], int8 or for 16 bits int16, and their scales s [m], which divide, of float x [m, k] (rows
// x_stride elements apart).
BITNET_EXPORT int32_t bitnet_quantize(const void* x, int32_t x_type, int64_t x_stride, int64_t m, int64_t k,
                                      int32_t activation_bits, void* q, float* s, int32_t isa, int32_t threads);

// y [m, k] contiguous = the Walsh-Hadamard transform of float x [m, k] (rows x_stride elements apart) times signs [k]
// (null: 1), in blocks of so many features, a power of two that divides k. y has x's type.
BITNET_EXPORT int32_t bitnet_hadamard(const void* x, int32_t x_type, int64_t x_stride, int64_t m, int64_t k, int64_t block,
                                      const int8_t* signs, float factor, void* y, int32_t isa, int32_t threads);

// Ternary codes int8 [n, k] of a contiguous latent weight [n, k]: clamp(round(w inv), -1, 1). inv: [1], or [n] if per_row.
BITNET_EXPORT int32_t bitnet_ternary_codes(const void* w, int32_t type, int64_t n, int64_t k, const float* inv,
                                           int32_t per_row, int8_t* codes, int32_t isa, int32_t threads);

// The same codes as Hub bytes [ceil(n/4), k].
BITNET_EXPORT int32_t bitnet_pack_ternary(const void* w, int32_t type, int64_t n, int64_t k, const float* inv,
                                          int32_t per_row, uint8_t* hub, int32_t isa, int32_t threads);

// sums [n] = the sum of |w| over each row of a contiguous latent weight [n, k]: not finite if the row is not.
BITNET_EXPORT int32_t bitnet_magnitudes(const void* w, int32_t type, int64_t n, int64_t k, double* sums,
                                        int32_t isa, int32_t threads);

BITNET_EXPORT int32_t bitnet_choose(const Columns* columns, int32_t threads);

// Reads bytes once and returns a checksum: the yardstick that benchmarks hold kernels against. Used for nothing else.
BITNET_EXPORT int64_t bitnet_read(const void* data, int64_t bytes, int32_t threads);
