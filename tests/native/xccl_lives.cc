// Stress of losses: rank 0 asks, the others answer, and each of them lives only for a while. Requests are
// left open by a life that ends, given up, rerouted and answered late; every sum that comes about is
// that of the layer computed by hand, bit by bit. Random delays at every step of the protocols.
//
//   xccl_lives NUM_RANKS EXCHANGES
//
// Ranks are threads, as the thread sanitizer needs it.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "exchange.h"
#include "p2p.h"
#include "server.h"
#include "stress.h"

namespace xds::xccl {
namespace {

constexpr uint32_t kWidth = 24, kTopK = 2, kExperts = 6;
constexpr int64_t kFrozenNs = 20'000'000'000;  // nobody freezes here
constexpr int64_t kNapNs = 1'000'000;

// One life of a rank: its primitives, and meeting the lives of others.
class Life {
 public:
  Life(const std::string& run, uint32_t rank, uint32_t num_ranks, std::mt19937& random)
      : run(run),
        num_ranks(num_ranks),
        random(random),
        core(Segment::create(run, name(rank), rank, small_layout(num_ranks)), kFrozenNs),
        p2p(core, trace),
        asker(core, trace),
        server(core, trace) {}

  // Attaches the life that a rank has now; false when it has none that is new.
  bool meet(uint32_t rank) {
    try {
      const Blob blob = Segment::read_blob(run, name(rank));
      const SegmentHeader header = from_blob(blob.data(), blob.size());
      if (core.is_attached(rank) && core.peer(rank).incarnation >= header.incarnation) return false;
      core.attach(Segment::open(blob));
    } catch (const SegmentFault&) {
      return false;  // between two lives
    }
    p2p.reset(rank);
    asker.reset(rank);
    server.reset(rank);
    return true;
  }
  uint32_t pick(uint32_t count) { return static_cast<uint32_t>(random() % count); }
  static std::string name(uint32_t rank) { return "r" + std::to_string(rank); }

  const std::string run;
  const uint32_t num_ranks;
  std::mt19937& random;
  Trace trace;
  Core core;
  P2p p2p;
  Asker asker;
  Server server;
};

uint8_t message_byte(uint32_t tag, uint64_t at) { return static_cast<uint8_t>(tag * 7 + at); }

// A life of rank 0.
class Asking : Life {
 public:
  Asking(const std::string& run, uint32_t num_ranks, std::mt19937& random)
      : Life(run, 0, num_ranks, random), exchange_(core, asker), messages_(num_ranks) {}

  // Until `count` exchanges are complete.
  void run_for(uint32_t count) {
    for (uint32_t done = 0; done < count;) {
      begin();
      done += run_exchange();
      exchange_.release();
    }
  }

 private:
  void begin() {
    num_rows_ = 1 + pick(5);
    rows_.resize(size_t{num_rows_} * kWidth);
    for (float& value : rows_) value = static_cast<float>(static_cast<int>(pick(255)) - 127);
    // With 127 in each row, whole numbers survive quantization.
    for (uint32_t row = 0; row < num_rows_; ++row) rows_[size_t{row} * kWidth] = 127.0f;
    experts_.resize(size_t{num_rows_} * kTopK);
    weights_.resize(experts_.size());
    for (int32_t& expert : experts_) expert = static_cast<int32_t>(pick(kExperts + 1)) - 1;
    for (float& weight : weights_) weight = static_cast<float>(1 + pick(9)) / 8.0f;
    exchange_.begin({.quantize = pick(2) == 0,
                     .rows = reinterpret_cast<const uint8_t*>(rows_.data()),
                     .num_rows = num_rows_,
                     .width = kWidth});
    const Pairs pairs{.experts = experts_.data(),
                      .num_slots = static_cast<uint32_t>(experts_.size()),
                      .top_k = kTopK};
    require(exchange_.add_routed(pairs, draw_owners(), next_tag(), 0, {}), "routing");
  }

  // False when it was given up.
  bool run_exchange() {
    const int64_t deadline = now_ns() + kLimitNs;
    const auto is_over = [&] {
      p2p.push_all();
      require(exchange_.post() != Status::kTooLarge, "size of a request");
      return exchange_.collect() || exchange_.has_lost();
    };
    for (;;) {
      require(now_ns() < deadline, "no progress before the time limit");
      for (uint32_t rank = 1; rank < num_ranks; ++rank) meet(rank);
      send_something();
      const Status status =
          core.wait(is_over, now_ns() + kNapNs, [&] { return exchange_.owing(); });
      if (exchange_.collect()) return check();
      if (pick(24) == 0) return false;
      if (status == Status::kPeerLost) exchange_.mark_dead();
      if (exchange_.has_lost() || pick(16) == 0) reroute();
    }
  }

  // Whatever is not answered goes to other ranks, whoever was asked before.
  void reroute() {
    std::vector<uint32_t> all;
    for (uint32_t rank = 1; rank < num_ranks; ++rank) all.push_back(rank);
    require(exchange_.reroute(all, draw_owners(), next_tag()), "rerouting");
  }

  bool check() {
    for (const Part& part : exchange_.parts()) require(part.state != PartState::kRefused, "refused");
    std::vector<float> sums(rows_.size()), expected(rows_.size());
    require(exchange_.combine(weights_.data(), sums.data(), num_rows_, kWidth) == Status::kOk,
            "combine");
    for (size_t slot = 0; slot < experts_.size(); ++slot) {
      if (experts_[slot] < 0) continue;
      const size_t row = slot / kTopK * kWidth;
      const auto factor = static_cast<float>(experts_[slot] + 1);
      for (size_t i = row; i < row + kWidth; ++i) expected[i] += weights_[slot] * (rows_[i] * factor);
    }
    require(std::memcmp(sums.data(), expected.data(), sums.size() * 4) == 0, "sum of the answers");
    return true;
  }

  void send_something() {
    const uint32_t to = 1 + pick(num_ranks - 1);
    if (!core.is_attached(to) || p2p.is_sending(to)) return;
    std::vector<uint8_t>& message = messages_[to];
    message.resize(pick(700));
    for (size_t i = 0; i < message.size(); ++i) message[i] = message_byte(step_, i);
    require(p2p.begin_send(to, message.data(), message.size(), step_) == Status::kOk, "send");
    p2p.push(to);
  }

  std::span<const int32_t> draw_owners() {
    owners_.resize(kExperts);
    for (int32_t& owner : owners_) owner = static_cast<int32_t>(1 + pick(num_ranks - 1));
    return owners_;
  }
  Tag next_tag() { return {.step_idx = ++step_, .epoch = 1}; }

  Exchange exchange_;
  uint32_t num_rows_ = 0, step_ = 0;
  std::vector<float> rows_, weights_;
  std::vector<int32_t> experts_, owners_;
  std::vector<std::vector<uint8_t>> messages_;  // to each rank
};

// A life of another rank.
class Serving : Life {
 public:
  using Life::Life;

  // Until `count` requests are answered; some are left open.
  void run_for(uint32_t count, const std::atomic<bool>& is_over) {
    const auto has_news = [&] { return server.has_arrivals(); };
    while (count > 0 && !is_over) {
      meet(0);
      if (!core.is_attached(0)) {
        usleep(200);
        continue;
      }
      receive();
      Incoming request;
      if (server.take(request)) {
        open_.push_back(request);
      } else if (open_.empty()) {
        core.wait(has_news, now_ns() + kNapNs, [] { return std::span<const uint32_t>(); });
      }
      if (!open_.empty() && pick(4) != 0) count -= answer_one() ? 1 : 0;
    }
  }

 private:
  bool answer_one() {  // not the oldest first
    std::swap(open_[pick(static_cast<uint32_t>(open_.size()))], open_.back());
    const Incoming request = open_.back();
    open_.pop_back();
    const bool quantize = pick(2) == 0;
    const Answer answer{.row_type = quantize ? RowType::kInt8 : RowType::kFloat32,
                        .num_rows = request.num_meta / 2,
                        .row_bytes = kWidth * (quantize ? 1 : 4)};
    uint64_t scales = 0, rows = 0;
    const Status placed = server.place(0, request.source_incarnation, request.seq, answer, scales,
                                       rows);
    if (placed == Status::kStale) return false;
    require(placed == Status::kOk, "place of an answer");
    write_rows(request, quantize, core.own().at<float>(scales), core.own().base() + rows);
    require(server.publish(0, request.source_incarnation, request.seq, answer) == Status::kOk,
            "answer");
    return true;
  }

  void write_rows(const Incoming& request, bool quantize, float* scales, uint8_t* out) {
    const Segment& theirs = *core.peer(0).segment;
    const auto* pairs = theirs.at<const int32_t>(request.meta_offset);
    const auto* their_scales = theirs.at<const float>(request.scales_offset);
    float row[kWidth];
    for (uint32_t pair = 0; pair < request.num_meta / 2; ++pair) {
      const auto source = static_cast<uint32_t>(pairs[2 * pair]);
      require(source < request.num_rows, "row of a pair");
      read_row(theirs.base() + request.rows_offset + uint64_t{source} * request.row_bytes,
               request.row_type, request.row_type == RowType::kInt8 ? their_scales[source] : 1.0f,
               kWidth, row);
      for (float& value : row) value *= static_cast<float>(pairs[2 * pair + 1] + 1);
      if (quantize) {
        scales[pair] = quantize_row(row, kWidth, reinterpret_cast<int8_t*>(out) + pair * kWidth);
      } else {
        std::memcpy(out + pair * sizeof row, row, sizeof row);
      }
    }
  }

  void receive() {  // in place
    ChunkView chunk{};
    if (p2p.lend(0, chunk) != Status::kOk) return;
    const uint64_t first =
        chunk.chunk_idx * chunk_bytes(chunk.total_bytes, core.params().p2p_slot_bytes);
    for (uint64_t i = 0; i < chunk.bytes; ++i) {
      require(chunk.data[i] == message_byte(chunk.tag, first + i), "byte of a message");
    }
    require(p2p.give_back(0) == Status::kOk, "give back");
  }

  std::vector<Incoming> open_;
};

void run_asker(const std::string& run, uint32_t num_ranks, uint32_t exchanges) {
  std::mt19937 random(1);
  while (exchanges > 0) {
    const uint32_t count = std::min<uint32_t>(exchanges, 1 + static_cast<uint32_t>(random() % 20));
    Asking(run, num_ranks, random).run_for(count);
    exchanges -= count;
  }
}

void run_server(const std::string& run, uint32_t rank, uint32_t num_ranks,
                const std::atomic<bool>& is_over) {
  std::mt19937 random(rank + 1);
  while (!is_over) {
    Serving(run, rank, num_ranks, random).run_for(1 + static_cast<uint32_t>(random() % 8), is_over);
  }
}

}  // namespace
}  // namespace xds::xccl

int main(int argc, char** argv) {
  using namespace xds::xccl;
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s NUM_RANKS EXCHANGES\n", argv[0]);
    return 2;
  }
  const auto num_ranks = static_cast<uint32_t>(std::atoi(argv[1]));
  const auto exchanges = static_cast<uint32_t>(std::atoi(argv[2]));
  const std::string run = "lives" + std::to_string(getpid());
  armed_fault = kDelays;
  std::atomic<bool> is_over{false};
  std::vector<std::thread> servers;
  for (uint32_t rank = 1; rank < num_ranks; ++rank) {
    servers.emplace_back([&, rank] { run_server(run, rank, num_ranks, is_over); });
  }
  run_asker(run, num_ranks, exchanges);
  is_over = true;
  for (std::thread& server : servers) server.join();
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    unlink(("/dev/shm" + segment_name(run, Life::name(rank))).c_str());
  }
  std::printf("lives: %u ranks, %u exchanges: ok\n", num_ranks, exchanges);
  return 0;
}
