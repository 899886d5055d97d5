// Attention over a bf16 or int8 cache by dot products of bf16 pairs. An output has one accumulator
// that takes the pairs of a partition in ascending order, for many rows and for few.

struct NoFetch {
  void step() {}
};

// Brings in 16 rows, line by line, while 16 others are multiplied: a line holds 16 pairs.
class RowsAhead {
 public:
  RowsAhead(const uint16_t* rows, ptrdiff_t stride)
      : rows_(reinterpret_cast<const uint8_t*>(rows)), stride_(stride) {}

  void step() {
    if (rows_ != nullptr) __builtin_prefetch(rows_ + at_ % 16 * stride_ + at_ / 16 * 64, 0, 3);
    ++at_;
  }

 private:
  const uint8_t* rows_;
  ptrdiff_t stride_;
  int64_t at_ = 0;
};

struct PairDots {
  static void begin() {}

  // Products of `rows` rows and two panels: body(row, which panel, 16 results, 16 more).
  template <class Body>
  static void panels(const void* a, ptrdiff_t a_stride, int64_t rows, const uint8_t* b,
                     const uint8_t* other, int64_t groups, Body&& body) {
    const auto* from = static_cast<const uint8_t*>(a);
    for (int which = 0; which < (b == other ? 1 : 2); ++which) {
      for_row_tiles<kBf16Rows>(rows, [&](auto size, int64_t first) {
        constexpr int R = size;
        F16 sums[R][2];
        NoFetch fetch;
        multiply<R, 2>(from + first * a_stride, a_stride, which == 0 ? b : other, kStepBytes,
                       groups, fetch, sums);
        for (int r = 0; r < R; ++r) body(first + r, which, sums[r][0], sums[r][1]);
      });
    }
  }

  // Scores [64, 16] of 64 positions for a panel of 16 query rows; the first panel brings in what
  // the others find.
  static void latents(const LatentRows& latents, const uint8_t* panel, int64_t groups,
                      bool is_first, float* scores) {
    constexpr int R = 16;
    for (int64_t i = 0; i < latents.count; ++i) {
      const uint16_t* after = i + 1 < latents.count ? latents.pieces[i + 1] : latents.next;
      RowsAhead fetch(is_first ? after : nullptr, latents.stride);
      F16 sums[R][1];
      multiply<R, 1>(reinterpret_cast<const uint8_t*>(latents.pieces[i]), latents.stride, panel, 64,
                     groups, fetch, sums);
      for (int r = 0; r < R; ++r, scores += kQueryLanes) store(scores, sums[r][0]);
    }
  }

 private:
  template <int R, int V, class Fetch>
  static void multiply(const uint8_t* a, ptrdiff_t a_stride, const uint8_t* b, ptrdiff_t b_stride,
                       int64_t groups, Fetch& fetch, F16 (&sums)[R][V]) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
    }
    accumulate<Bf16Product, R, V>(sums, a, a_stride, b, b_stride, groups * kGroup / 2, fetch);
  }
};

// sum + the dot products of 16 pairs with the pair at `factors`.
inline F16 dot_pairs(const F16& sum, const uint16_t* factors, __m512i pairs) {
  const __m512i pair = broadcast4(reinterpret_cast<const uint8_t*>(factors));
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(pair),
                           reinterpret_cast<__m512bh>(pairs))};
}

// 16 neighbours at `p` and those at `odd`, side by side as bf16 pairs.
inline __m512i pair_of(const uint16_t* p, const uint16_t* odd) {
  alignas(64) static constexpr uint16_t kOrder[] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i even = _mm512_castsi256_si512(load_half(p));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder),
                                  _mm512_inserti64x4(even, load_half(odd), 1));
}
inline __m512i pair_of(const int8_t* p, const int8_t* odd) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
  return bf16_of_bytes(_mm256_set_m128i(_mm_unpackhi_epi8(first, second),
                                        _mm_unpacklo_epi8(first, second)));
}

struct PairFew {
  using Factor = uint16_t;

  static void round(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
      keep(out, i, round_query(x + i, n - i));
    }
  }

  static void keep(uint16_t* row, int64_t at, __m256i bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + at), bits);
  }

  template <class E, int R, int V>
  static void score(const AttendTask& t, const typename E::T* const* keys,
                    const FewAhead<typename E::T, V>& ahead, const uint16_t* const* q,
                    float* scores) {
    F16 sums[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
    }
    auto add_pairs = [&](int64_t d, int v, __m512i pairs) {
      for (int r = 0; r < R; ++r) sums[r][v] = dot_pairs(sums[r][v], q[r] + d, pairs);
    };
    int64_t d = 0;
    for (; d + 2 <= t.key_dim; d += 2) {
      ahead.fetch(d, t.block_size);
      ahead.fetch(d + 1, t.block_size);
      for (int v = 0; v < V; ++v) {
        const typename E::T* line = keys[v] + d * t.block_size;
        add_pairs(d, v, pair_of(line, line + t.block_size));
      }
    }
    for (int v = 0; d < t.key_dim && v < V; ++v) {  // the last one's neighbour is zero
      const typename E::T* line = keys[v] + d * t.block_size;
      add_pairs(d, v, _mm512_and_si512(pair_of(line, line), _mm512_set1_epi32(0xFFFF)));
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) store(scores + r * kPartition + 16 * v, sums[r][v]);
    }
  }

  template <class E, int R>
  static void weigh(const AttendTask& t, const typename E::T* const* values,
                    const uint16_t* const* weights, int64_t count, float* part, int64_t pitch) {
    int64_t column = 0;
    for (; column + 2 * kGroup <= t.value_dim; column += 2 * kGroup) {
      weigh_columns<E, R, 2>(t, values, weights, count, column, part, pitch);
    }
    for (; column < t.value_dim; column += kGroup) {
      weigh_columns<E, R, 1>(t, values, weights, count, column, part, pitch);
    }
  }

 private:
  // Weighted values of G times 32 columns from `column`.
  template <class E, int R, int G>
  static void weigh_columns(const AttendTask& t, const typename E::T* const* values,
                            const uint16_t* const* weights, int64_t count, int64_t column,
                            float* part, int64_t pitch) {
    F16 low[R][G], high[R][G];
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < G; ++g) low[r][g] = high[r][g] = set1(0.0f);
    }
    const int64_t columns = lesser(G * kGroup, t.value_dim - column);
    const auto mask = static_cast<__mmask32>((uint64_t{1} << lesser(kGroup, columns)) - 1);
    for (int64_t j = 0; j < count; j += 2) {
      for (int g = 0; g < G; ++g) {
        const int64_t at = column + g * kGroup;
        const __m512i even = load_row(values[j] + at, mask);
        const __m512i odd =
            j + 1 < count ? load_row(values[j + 1] + at, mask) : _mm512_setzero_si512();
        const __m512i first = _mm512_unpacklo_epi16(even, odd);
        const __m512i second = _mm512_unpackhi_epi16(even, odd);
        for (int r = 0; r < R; ++r) {
          low[r][g] = dot_pairs(low[r][g], weights[r] + j, first);
          high[r][g] = dot_pairs(high[r][g], weights[r] + j, second);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < G; ++g) {
        const Pair sums = in_order(low[r][g], high[r][g]);
        float* to = part + r * pitch + column + g * kGroup;
        store(to, sums.first);
        if (columns > g * kGroup + 16) store(to + 16, sums.second);
      }
    }
  }
};

template <class E>
inline void attend_pairs(const AttendTask& t) {
  is_for_few(t) ? attend_few<PairFew, E>(t) : attend_many<PairDots, E>(t);
}

void attend_bf16(const AttendTask& t) {
  switch (t.type) {
    case KvType::kFloat32: return attend_typed<F32Element>(t);
    case KvType::kBf16: return attend_pairs<Bf16Element>(t);
    case KvType::kInt8: return attend_pairs<Int8Element>(t);
  }
}
