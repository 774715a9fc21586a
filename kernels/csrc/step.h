// The decoder blocks of a model over some tokens: one call a step, one team of threads that meet at barriers.
#pragma once
#include "multiply.h"
#include "numbers.h"

namespace {

thread_local Scratch step_scratch;       // of the leading thread: activations of all tokens, and their codes
thread_local Scratch attention_scratch;  // of each thread: scores

// [tokens, heads, head_dim], with room between.
struct Heads {
  float* first;
  int64_t token, head;  // how far they are apart

  float* at(int64_t t, int64_t h) const { return first + t * token + h * head; }
};

struct Step {
  const Plan& plan;
  const Isa& isa;
  const Isa* (*find)(int32_t form, int32_t i);
  float* x;
  int64_t m;
  const Sequence* sequences;
  const int64_t *sequence, *position;
  const Between& f = *isa.between;
  Heads q = {}, k = {}, v = {};
  float *attended = nullptr, *gate = nullptr, *up = nullptr, *y = nullptr, *z = nullptr;
  void* panels = nullptr;
  int64_t query_width = plan.heads * plan.head_dim, key_width = plan.kv_heads * plan.head_dim;

  // Activations and codes of all tokens lie one after the other.
  int64_t floats() const { return m * (2 * query_width + 2 * key_width + 2 * plan.inner + 2 * plan.hidden); }

  void place(void* memory) {
    auto* first = static_cast<float*>(memory);
    const int64_t dim = plan.head_dim;
    if (plan.by_head) {
      q = {first, 3 * query_width, 3 * dim};
      k = {first + dim, 3 * query_width, 3 * dim};
      v = {first + 2 * dim, 3 * query_width, 3 * dim};
    } else {
      q = {first, query_width, dim};
      k = {first + m * query_width, key_width, dim};
      v = {k.first + m * key_width, key_width, dim};
    }
    attended = first + m * (query_width + 2 * key_width);
    gate = attended + m * query_width;
    up = gate + m * plan.inner;
    y = up + m * plan.inner;
    z = y + m * plan.hidden;
    panels = reinterpret_cast<char*>(memory) + ceil_div(4 * floats(), 64) * 64;
  }

  Call call(const PreparedWeight& layer, const float* from, float* to) const {
    return {layer, *find(layer.form, layer.isa), reinterpret_cast<const char*>(from), kFloat32, 4 * layer.k, nullptr,
            reinterpret_cast<char*>(to), kFloat32, 4 * layer.n};
  }

  template <class Visit>
  void each_product(const Visit& visit) const {
    for (int64_t b = 0; b < plan.count; ++b) {
      const Block& block = plan.blocks[b];
      for (int i = 0; i < block.in_count; ++i) visit(block.in[i]);
      for (int i = 0; i < block.gate_count; ++i) visit(block.gate[i]);
      visit(block.out);
      visit(block.down);
    }
  }

  // Row t of a product's input, [k]; to: where it is made if it is not x's own.
  const float* input(const Product& product, const float* from, int64_t t, float* to) const {
    const int64_t width = product.layers[0]->k;
    from += t * width;
    for (const Norm& norm : product.norms)
      if (norm.weight) {
        f.normalize(from, norm, width, to);
        from = to;
      }
    if (product.hadamard) {
      const float factor = 1 / __builtin_sqrtf(float(product.hadamard));
      isa.hadamard(from, kFloat32, width, product.hadamard, product.signs, factor, to);
      from = to;
    }
    return from;
  }

  // Whether codes made for one layer are those that another takes.
  static bool same_codes(const Call& a, const Call& b) {
    return a.padded == b.padded && a.limbs == b.limbs && a.activation_bits == b.activation_bits &&
           a.groups.size == b.groups.size && &a.isa == &b.isa;
  }

  // A thread's share of a product's outputs, to[i] [m, n] for layer i. The caller waits before they are used.
  void multiply(const Product& product, const float* from, float* const* to, int thread, int count) const {
    const int64_t width = product.layers[0]->k;
    auto* row = static_cast<float*>(row_scratch.memory);
    char* rest = reinterpret_cast<char*>(row + ceil_div(width, 16) * 16);
    const float* single = m == 1 ? input(product, from, 0, row) : nullptr;
    Token token;
    Panels all;
    for (int i = 0; i < product.count; ++i) {
      const PreparedWeight& layer = *product.layers[i];
      const Call now = call(layer, m == 1 ? single : from, to[i]);
      const bool again = i == 0 || !same_codes(call(*product.layers[i - 1], from, to[i]), now);
      const int64_t blocks = ceil_div(layer.n, kBlockRows), first = share(blocks, thread, count),
                    last = share(blocks, thread + 1, count);
      if (m == 1) {
        if (again) token = make_token(now, rest);
        now.isa.gemv(layer, first, last, token, to[i], kFloat32);
        continue;
      }
      const int64_t scratch = scratch_bytes(m, now.limbs, layer.group_size);
      if (again) {
        if (i) barrier(count);
        all = place_panels(now, m, panels);
        fill_panels(now, all, reinterpret_cast<int8_t*>(rest + scratch), thread, count,
                    [&](int64_t t, int8_t* codes, int32_t* sums) {
                      return now.quantize_token(reinterpret_cast<const char*>(input(product, from, t, row)), codes, sums);
                    });
        barrier(count);
      }
      now.isa.gemm(layer, first, last, all, rest, to[i], kFloat32);
    }
  }

  int64_t thread_bytes() const {
    int64_t most = 0;
    each_product([&](const Product& product) {
      for (int i = 0; i < product.count; ++i) {
        const Call now = call(*product.layers[i], nullptr, nullptr);
        const int64_t scratch = scratch_bytes(m, now.limbs, now.layer.group_size), one = token_bytes(now);
        const int64_t bytes = (now.layer.k + 16) * 4 + scratch + now.row_bytes() + one;
        most = most < bytes ? bytes : most;
      }
    });
    return most;
  }

  int64_t shared_panel_bytes() const {
    int64_t most = 0;
    each_product([&](const Product& product) {
      for (int i = 0; i < product.count; ++i) {
        const int64_t bytes = panel_bytes(call(*product.layers[i], nullptr, nullptr), m);
        most = most < bytes ? bytes : most;
      }
    });
    return most;
  }

  CachedHead cached(int64_t block, int64_t t, int64_t head) const {
    const Sequence& in = sequences[sequence[t]];
    const int64_t at = (block * plan.kv_heads + head) * in.capacity;
    const int64_t offset = at * plan.head_dim * element_size(plan.cache_type);
    const bool scaled = plan.cache_type == kInt8;
    return {static_cast<char*>(in.keys) + offset, static_cast<char*>(in.values) + offset,
            scaled ? in.key_scales + at : nullptr, scaled ? in.value_scales + at : nullptr};
  }

  // Norms and positions of heads, in place.
  void turn(const Block& block, const Norm& norm, float* head, int64_t t) const {
    if (norm.weight && !block.whole) f.normalize(head, norm, plan.head_dim, head);
    if (block.rope < 0) return;
    const int64_t at = position[t] * plan.half;
    f.rotate(plan.ropes[block.rope][0] + at, plan.ropes[block.rope][1] + at, plan.half, plan.interleaved, head);
  }

  void attention(int64_t b, int thread, int count) const {
    const Block& block = plan.blocks[b];
    const int64_t dim = plan.head_dim, group = plan.heads / plan.kv_heads, all = plan.heads + plan.kv_heads;
    if (block.whole) {
      for (int64_t i = share(2 * m, thread, count); i < share(2 * m, thread + 1, count); ++i) {
        const Norm& norm = i < m ? block.query : block.key;
        const int64_t width = i < m ? query_width : key_width;
        float* row = i < m ? q.at(i, 0) : k.at(i - m, 0);
        if (norm.weight) f.normalize(row, norm, width, row);
      }
      barrier(count);
    }
    for (int64_t i = share(m * all, thread, count); i < share(m * all, thread + 1, count); ++i) {
      const int64_t t = i / all, head = i % all - plan.heads;
      if (head < 0) {
        float* query = q.at(t, i % all);
        turn(block, block.query, query, t);
        for (int64_t j = 0; j < dim; ++j) query[j] *= plan.scaling;
      } else {
        float* key = k.at(t, head);
        turn(block, block.key, key, t);
        f.store(plan.cache_type, cached(b, t, head), position[t], key, v.at(t, head), dim);
      }
    }
    barrier(count);
    int64_t turn_of = 0;
    for (int64_t t = 0, end; t < m; t = end) {  // tokens of one sequence
      for (end = t + 1; end < m && sequence[end] == sequence[t];) ++end;
      const int64_t queries = (end - t) * group;
      for (int64_t at = 0; at < queries; at += kTileQueries)
        for (int64_t head = 0; head < plan.kv_heads; ++head) {
          if (turn_of++ % count != thread) continue;
          Query tile[kTileQueries];
          const int here = int(smaller(kTileQueries, queries - at));
          for (int i = 0; i < here; ++i) {
            const int64_t row = t + (at + i) / group, of = head * group + (at + i) % group, last = position[row] + 1;
            const int64_t seen = block.window && block.window < last ? block.window : last;
            tile[i] = {q.at(row, of), attended + row * query_width + of * dim, last - seen, last};
          }
          f.attend(plan.cache_type, cached(b, t, head), tile, here, dim, plan.cap,
                   static_cast<float*>(attention_scratch.memory));
        }
    }
  }

  // x += from, after a norm of it if there is one. A thread has written its share of from's columns; all see x afterwards.
  void add(float* from, const Norm& norm, int thread, int count) const {
    if (norm.weight) {
      barrier(count);
      for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
        float* row = from + t * plan.hidden;
        f.normalize(row, norm, plan.hidden, row);
        for (int64_t i = 0; i < plan.hidden; ++i) x[t * plan.hidden + i] += row[i] * plan.residual;
      }
    } else {
      const int64_t blocks = ceil_div(plan.hidden, kBlockRows), first = share(blocks, thread, count) * kBlockRows,
                    last = smaller(share(blocks, thread + 1, count) * kBlockRows, plan.hidden);
      for (int64_t t = 0; t < m; ++t)
        for (int64_t i = t * plan.hidden + first; i < t * plan.hidden + last; ++i) x[i] += from[i] * plan.residual;
    }
    barrier(count);
  }

  void run(int64_t b, int thread, int count) const {
    const Block& block = plan.blocks[b];
    float* in[] = {q.first, k.first, v.first};
    for (int i = 0, at = 0; i < block.in_count; at += int(block.in[i++].count)) {
      if (i) barrier(count);
      multiply(block.in[i], x, in + at, thread, count);
    }
    barrier(count);
    attention(b, thread, count);
    barrier(count);
    multiply(block.out, attended, &(in[0] = z), thread, count);
    if (block.parallel) barrier(count);
    else add(z, block.after_attention, thread, count);
    float* gates[] = {gate, up};
    for (int i = 0, at = 0; i < block.gate_count; at += int(block.gate[i++].count)) {
      if (i) barrier(count);
      multiply(block.gate[i], x, gates + at, thread, count);
    }
    const int64_t blocks = ceil_div(plan.inner, kBlockRows), first = share(blocks, thread, count) * kBlockRows,
                  last = smaller(share(blocks, thread + 1, count) * kBlockRows, plan.inner);
    for (int64_t t = 0; t < m; ++t)
      f.apply_gate(plan.gate, gate + t * plan.inner + first, plan.gated ? up + t * plan.inner + first : nullptr, last - first);
    barrier(count);
    multiply(block.down, gate, &(in[0] = y), thread, count);
    if (block.parallel) add(z, block.after_attention, thread, count);
    add(y, block.after_mlp, thread, count);
  }

  Status run_all(int threads) {
    int64_t longest = 0;
    for (int64_t t = 0; t < m; ++t) longest = longest < position[t] + 1 ? position[t] + 1 : longest;
    void* memory = step_scratch.reserve(ceil_div(4 * floats(), 64) * 64 + shared_panel_bytes());
    if (!memory) return kNoMemory;
    place(memory);
    const int64_t bytes = thread_bytes(), scores = (longest + 32) * kTileQueries * 4;
    Status status = kOk;
    bool alone = false;
    parallel(threads, [&](int thread, int count) {
      if (!row_scratch.reserve(bytes) || !attention_scratch.reserve(scores))
        __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
      barrier(count);
      if (__atomic_load_n(&status, __ATOMIC_RELAXED) != kOk) return;
      Watch watch;
      for (int64_t b = 0; b < plan.count; ++b) {
        run(b, thread, count);
        if (count == 1) continue;
        if (thread == 0) alone = watch.lost();
        barrier(count);
        if (alone && thread > 0) return;
        if (alone) count = 1;
      }
      for (int64_t t = share(m, thread, count); t < share(m, thread + 1, count); ++t) {
        float* row = x + t * plan.hidden;
        if (plan.final.weight) f.normalize(row, plan.final, plan.hidden, row);
      }
    });
    return status;
  }
};

}  // namespace
